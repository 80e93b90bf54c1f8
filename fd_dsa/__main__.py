"""`python -m fd_dsa` and the console script `fd-dsa`."""

from __future__ import annotations

import signal
import sys

# Ctrl-C during the imports ends the process without a stack trace; `signals.command` restores it
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from fd_dsa.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
