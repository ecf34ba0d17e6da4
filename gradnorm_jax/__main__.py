"""`python -m gradnorm_jax` is the command `gradnorm`."""

import sys

from gradnorm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
