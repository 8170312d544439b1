"""What every stored folder shares: manifests, digests, atomic writes, locks."""
