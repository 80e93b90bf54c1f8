"""`python -m fd_dsa.doctor`."""

import sys

from fd_dsa.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
