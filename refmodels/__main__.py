"""`python -m refmodels`."""

import sys

from refmodels.cli import main

if __name__ == "__main__":
    sys.exit(main())
