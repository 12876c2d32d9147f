"""Settings of every test process, made before JAX starts."""

import os

# Most of the suite's time is compilation; unoptimised machine code computes the same and compiles in half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing is kept between runs of the tests, nor in anybody's home; tests that start a program twice say so themselves.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
