"""Settings of every test process, made before JAX starts."""

import os

# Most of the suite's time is compilation; unoptimised machine code computes the same and compiles in half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
