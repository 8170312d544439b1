"""Gathers finished runs and scores into the rows and columns of reports."""
