"""Finished runs and scores, gathered into the rows and columns that reports draw."""
