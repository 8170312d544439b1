"""Running work: processes, threads and ranks, devices, signals, random draws, progress, and system errors."""
