"""Pretraining methods, one file each, and their losses."""
