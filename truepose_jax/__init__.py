"""truepose_jax: pose-guided person image synthesis in JAX. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
