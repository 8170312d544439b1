"""Shared by all stored folders: manifests, digests, atomic writes, locks."""
