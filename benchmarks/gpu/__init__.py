"""Whether cae2pipe is right on a device, and how fast: ``python -m benchmarks.gpu``, in parts."""
