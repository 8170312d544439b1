"""Scores of encoders: on frozen features, and fine-tuned as classifiers."""
