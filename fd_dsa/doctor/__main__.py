"""`python -m fd_dsa.doctor`."""

from __future__ import annotations

import sys

from fd_dsa.doctor import main

sys.exit(main())
