"""`python -m fd_dsa.serve`."""

import sys

from fd_dsa.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
