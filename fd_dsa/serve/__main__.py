"""`python -m fd_dsa.serve`."""

from __future__ import annotations

import sys

from fd_dsa.environment import command
from fd_dsa.serve.cli import main

if __name__ == "__main__":
    with command():
        sys.exit(main())
