"""Starts engines one after another in a process, and prints kernels that compile too late.

`python -m tests.null_driver.second_engine`.
"""

from __future__ import annotations

import logging
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.host_time import v32
from tests.null_driver.engine import V4, V4_FORMATS, NullDriver, open_engine, replace
from tests.null_driver.random_steps import Printer


def check(form: Any, allocate: Any) -> str:
    """Launch as the check of experts in four bits does, with sizes of its own."""
    from fd_dsa.ops.expert_pairs import group_pairs

    group_pairs(allocate((3, 1), "int32"), 2)
    return ""


def main() -> None:
    """Start an engine with random weights in FP8, and then one with experts in four bits."""
    driver = NullDriver()
    replace(import_module("fd_dsa.models.four_bit_check"), "difference", check)
    replace(import_module("fd_dsa.startup.warm_up"), "usable_cpus", lambda: 2)
    logging.getLogger("fd_dsa.triton_runtime").addHandler(Printer(logging.WARNING))
    sizes: dict[str, Any] = {"max_model_len": 300, "max_num_seqs": 1, "max_num_batched_tokens": 64}
    sizes |= {"kv_cache_memory_bytes": "1G", "enforce_eager": True}
    engines = []
    for model in (v32(layers=2, dense=1, experts=16), V4 | V4_FORMATS):
        with tempfile.TemporaryDirectory() as folder:
            engines.append(open_engine(driver, model, Path(folder), **sizes))
    late = [engine.metrics.steps.late_compilations for engine in engines]
    print(f"late compilations: {late}")


if __name__ == "__main__":
    main()
