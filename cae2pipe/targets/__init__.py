"""Target sets: views and the teacher's latents, compressed, on disk."""
