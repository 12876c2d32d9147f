"""From image sets to batches, in an order that is a function of (seed, step)."""
