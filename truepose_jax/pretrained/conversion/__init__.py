"""PyTorch weights in and out, with numpy alone: no torch, no jax."""
