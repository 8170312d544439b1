"""Frozen models whose patch latents are the targets, with one small protocol."""
