"""Run a worker with the package of a checkout: `python -m benchmarks.workers CHECKOUT MODULE ...`.

`benchmarks` itself is imported already, so the checkout may be one that has no such worker.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path


def main(checkout: str, module: str, *args: str) -> None:
    """Run `module` as a program.

    Raises:
        RuntimeError: `fd_dsa` would be another one.
    """
    sys.path.insert(0, checkout)
    found = Path(import_module("fd_dsa").__file__ or "").resolve()
    if not found.is_relative_to(Path(checkout).resolve()):
        raise RuntimeError(f"fd_dsa: imported from {found}, wanted that of {checkout}")
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
