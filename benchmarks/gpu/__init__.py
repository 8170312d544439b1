"""Checks whether cae2pipe is correct on a device, and how fast: ``python -m benchmarks.gpu``, in parts."""
