"""How kernels run in this process, decided before Triton is loaded, and by which Triton."""

from __future__ import annotations

import re

from fd_dsa.environment import choose_triton_mode
from fd_dsa.errors import BackendUnavailable

INTERPRETING: bool = choose_triton_mode()
"""True where kernels run in Triton's interpreter on CPU tensors, False where they are compiled."""

try:
    import triton
except ImportError as error:
    raise BackendUnavailable(
        "triton is not installed, so no Triton kernel can run; install triton>=3.3,<3.10"
    ) from error

# versions whose internals were read and tried
if not (3, 3) <= tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) <= (3, 9):
    raise BackendUnavailable(
        f"triton {triton.__version__}: the launcher is tested with 3.3 to 3.9; "
        "install triton>=3.3,<3.10"
    )
