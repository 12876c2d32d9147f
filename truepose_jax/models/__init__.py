"""The networks, as Flax modules."""
