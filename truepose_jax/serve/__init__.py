"""A page and a plain HTTP interface for pictures from photos, on this machine: `python -m truepose_jax.serve`."""
