"""The programs, each to be read from top to bottom: one stage per file."""
