"""`python -m fd_dsa.accuracy`."""

from __future__ import annotations

import sys

from fd_dsa.accuracy.cli import main

if __name__ == "__main__":
    sys.exit(main())
