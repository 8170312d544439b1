"""Pretraining methods: forward, loss and choice of mask, one file each."""
