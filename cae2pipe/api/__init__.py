"""The functions behind every command, for scripts and notebooks. ``import cae2pipe`` has them all."""
