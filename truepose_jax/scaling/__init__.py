"""Large-batch scaling studies: `python -m truepose_jax.scaling`; see __main__.py."""
