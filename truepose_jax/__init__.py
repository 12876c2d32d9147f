"""truepose_jax: pose-guided person image synthesis in JAX. Importing this package imports nothing heavy."""

import pathlib
import sys

__version__ = "0.1.0"

BUNDLED = pathlib.Path(__file__).with_name("bundled")
"""Of a wheel alone: configs, input_pipeline and the models that come along (setup.py)."""
if BUNDLED.is_dir() and str(BUNDLED) not in sys.path:
    sys.path.append(str(BUNDLED))
