"""PyTorch weights in and out: the arrays are NumPy's, and no torch is needed. Settings (truepose_jax/config) bring JAX along."""
