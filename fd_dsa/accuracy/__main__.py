"""`python -m fd_dsa.accuracy`."""

from __future__ import annotations

import sys

from fd_dsa.accuracy.cli import main
from fd_dsa.environment import command

if __name__ == "__main__":
    with command():
        sys.exit(main())
