"""`python -m fd_dsa.doctor`."""

from __future__ import annotations

import sys

from fd_dsa.doctor import main
from fd_dsa.environment import command

with command():
    sys.exit(main())
