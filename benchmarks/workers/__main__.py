"""Run a worker with a checkout: `python -m benchmarks.workers CHECKOUT TARGET OPTIONS`.

`benchmarks` and `tests` are imported already, so the checkout may be one that has no such worker.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import tests  # noqa: F401
from benchmarks._harness import serve_requests


def main(checkout: str, target: str, options: str) -> None:
    """Answer requests of a `Worker`.

    Raises:
        RuntimeError: `fd_dsa` would be another one.
    """
    sys.path.insert(0, checkout)
    package = Path(import_module("fd_dsa").__file__ or "").resolve()
    if not package.is_relative_to(Path(checkout).resolve()):
        raise RuntimeError(f"fd_dsa: imported from {package}, not from {checkout}")
    name, _, kind = target.partition(":")
    module = import_module(name)
    serve_requests(getattr(module, kind)(**json.loads(options)) if kind else module)


if __name__ == "__main__":
    main(*sys.argv[1:])
