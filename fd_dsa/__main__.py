"""`python -m fd_dsa`: the same as the console script `fd-dsa`."""

from __future__ import annotations

import sys

from fd_dsa.cli import main

if __name__ == "__main__":
    sys.exit(main())
