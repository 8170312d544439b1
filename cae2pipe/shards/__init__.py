"""Originals: folders of images packed into shuffled WebDataset tars."""
