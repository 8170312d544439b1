"""What manifests and journals may hold: a model for each kind of folder, by which they are written and read."""
