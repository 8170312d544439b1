"""Any image to RGB; augmented views."""
