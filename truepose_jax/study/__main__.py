"""python -m truepose_jax.study"""

import logging
import sys

from truepose_jax.study import main

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)  # absl has put a handler of its own there
    sys.exit(main())
