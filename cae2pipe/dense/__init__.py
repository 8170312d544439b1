"""Segmentation and detection on a trained encoder. Needs the extra ``dense``; nothing else imports it."""
