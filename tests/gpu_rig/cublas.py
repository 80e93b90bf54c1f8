"""Where cuBLAS is, for a plug-in that opens it at first use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.gpu_rig.build import CUDA_FOLDER

NAME = "libcublas.so.13"


def find_cublas() -> Path | None:
    """The library in CUDA's folder or in NVIDIA's wheels; None leaves it to the loader."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), CUDA_FOLDER) if home]
    folders = [home / "lib64" for home in homes]
    folders += [wheel for path in sys.path for wheel in sorted(Path(path).glob("nvidia/*/lib"))]
    return next((folder / NAME for folder in folders if (folder / NAME).is_file()), None)
