"""`python -m fd_dsa.accuracy`."""

import sys

from fd_dsa.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["accuracy", *sys.argv[1:]]))
