"""Segmentation and detection with a trained encoder. Needs the extra ``dense``; no other package imports this one."""
