"""Pretraining: objective, step, loop, checkpoints, telemetry."""
