"""`python -m qwen2_jax` is `qwen2-jax`."""

import sys

from qwen2_jax.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
