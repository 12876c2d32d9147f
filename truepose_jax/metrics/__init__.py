"""Image metrics in NumPy and JAX, each with its protocol written down."""
