"""The programs, each read from top to bottom: one stage a file."""
