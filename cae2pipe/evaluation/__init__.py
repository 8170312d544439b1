"""Scores of encoders on frozen features."""
