"""Mode of the kernels of this process, decided before Triton is loaded, and Triton's version."""

from __future__ import annotations

import re

from fd_dsa.commands import triton_command
from fd_dsa.environment import choose_triton_mode
from fd_dsa.errors import BackendUnavailable

_INSTALL = f"run {triton_command()}"
INTERPRETING: bool = choose_triton_mode()
"""True if kernels run in Triton's interpreter on CPU tensors, False if they are compiled."""

try:
    import triton
except ImportError as error:
    raise BackendUnavailable(
        f"triton cannot be imported ({error}), and every kernel on a GPU needs it; {_INSTALL}, or "
        "compute on a CPU, which needs none (--device cpu)"
    ) from error

TRITON_VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
"""Major and minor version of Triton."""
# the launcher depends on internals of Triton, which were read and tried in these versions
if not (3, 3) <= TRITON_VERSION <= (3, 9):
    raise BackendUnavailable(
        f"triton {triton.__version__}: the launcher is tested with 3.3 to 3.9; {_INSTALL}"
    )
