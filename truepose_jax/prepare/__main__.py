"""python -m truepose_jax.prepare"""

import sys

from truepose_jax.prepare import main

if __name__ == "__main__":
    sys.exit(main())
