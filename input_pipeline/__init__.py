"""Photos, poses and parsing maps to batches of NumPy arrays. Knows nothing of JAX."""
