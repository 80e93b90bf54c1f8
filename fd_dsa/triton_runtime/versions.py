"""What differs between the supported Triton versions; features are probed where that is enough."""

from __future__ import annotations

import re

from fd_dsa.errors import BackendUnavailable

try:
    import triton
except ImportError as error:
    raise BackendUnavailable(
        "triton is not installed, so no Triton kernel can run; install triton>=3.3,<3.10"
    ) from error

LOWEST = (3, 3)
HIGHEST = (3, 9)


def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that is loaded."""
    major, minor = re.findall(r"\d+", triton.__version__)[:2]
    return int(major), int(minor)


def require_supported() -> None:
    """Refuse Triton versions whose internals were never read and tried.

    Raises:
        BackendUnavailable: the version is outside 3.3 to 3.9.
    """
    if not LOWEST <= triton_version() <= HIGHEST:
        raise BackendUnavailable(
            f"triton {triton.__version__}: the launcher is tested with 3.3 to 3.9; "
            "install triton>=3.3,<3.10"
        )
