"""Running work: processes, threads and ranks, devices, signals, random draws, progress, and what the system refuses."""
