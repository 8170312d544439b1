"""Frozen models whose patch latents are the targets, behind one small protocol."""
