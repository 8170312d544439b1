"""From a target set to batches on the device: the order of samples, and its execution."""
