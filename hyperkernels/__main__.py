"""`python -m hyperkernels` is the command `hyperkernels`."""

import sys

from hyperkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
