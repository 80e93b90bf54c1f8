"""How kernels run in this process; decided here, before Triton is loaded."""

from __future__ import annotations

from fd_dsa.environment import choose_triton_mode

INTERPRETING: bool = choose_triton_mode()
"""True where kernels run in Triton's interpreter on CPU tensors, False where they are compiled."""
