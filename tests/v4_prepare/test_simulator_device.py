"""Random histories of an engine on the device builder, as it is used: staged, expanded, read."""

from __future__ import annotations

from dataclasses import asdict
from random import Random
from typing import Any

import numpy as np
import pytest

from fd_dsa.v4_prepare import V4PrepareConfig
from tests.kernel_memory import KernelMemory, open_memory
from tests.v4_prepare.simulator import REAL, Sizes, simulate
from tests.v4_prepare.simulator_prepare import PreparedSteps, recorded
from tests.v4_prepare.simulator_requests import LongContexts


def _config(memory: KernelMemory, **changes: Any) -> V4PrepareConfig:
    """Small sizes; smaller still where kernels are interpreted."""
    less = {} if memory.large else {"max_num_tokens": 24, "max_tokens_per_seq": 20}
    return V4PrepareConfig(**asdict(Sizes()) | less | changes)


@pytest.mark.parametrize("swa", ["ring", "paged"])
@pytest.mark.parametrize("spec_tokens", [0, 1, 2, 3])
@pytest.mark.parametrize("late", [False, True], ids=["exact", "rollback"])
def test_the_device_serves_any_history(
    kernel_memory: KernelMemory, swa: str, spec_tokens: int, late: bool
) -> None:
    brief = ("ring", 3, True), ("paged", 0, False)
    if not kernel_memory.large and (swa, spec_tokens, late) not in brief:
        pytest.skip("for a GPU: an interpreted step takes half a second")
    cfg = _config(kernel_memory, swa=swa, spec_tokens=spec_tokens)
    build = PreparedSteps(cfg, kernel_memory)
    # one builder for all: rows, slots and blocks go from one history to the next
    num_histories, num_steps = (12, 50) if kernel_memory.large else (1, 5)
    for seed in range(num_histories):
        simulate(cfg, build, seed, num_steps, late=late)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"hca_mode": "table"}, {"comp_base": 0}], ids=str)
def test_the_device_serves_other_sizes(changes: dict[str, Any]) -> None:
    cfg = V4PrepareConfig(**asdict(Sizes()) | changes)
    build = PreparedSteps(cfg, open_memory("torch"))
    for seed in range(12):
        simulate(cfg, build, seed, 50)


@pytest.mark.gpu
@pytest.mark.parametrize("swa", ["ring", "paged"])
def test_the_device_serves_the_sizes_of_the_model(swa: str) -> None:
    cfg = V4PrepareConfig(**asdict(REAL) | {"swa": swa})
    build = PreparedSteps(cfg, open_memory("torch"))
    for seed in range(3):
        simulate(cfg, build, seed, 30, late=True, scheduler=LongContexts)


def _check_staged_ahead(build: PreparedSteps, seed: int, num_steps: int) -> None:
    """Replay a history with up to three steps staged before the first is expanded."""
    depth, steps = Random(seed), recorded(build.cfg, seed, num_steps)
    staged = 0
    for number, (*_, rollback, wanted) in enumerate(steps):
        while staged < min(len(steps), number + depth.randint(1, 3)):
            build.stage(*steps[staged][:4])
            staged += 1
        found = build.expand(rollback)
        for name, array in wanted.items():
            got = found[name][: len(array)] if name == "hca_idx" else found[name]
            np.testing.assert_array_equal(got, array, err_msg=f"step {number}: {name}")


by_cells = pytest.mark.parametrize("by_cells", [False, True], ids=["tables", "cells"])


@by_cells
@pytest.mark.parametrize("seed", range(5))
def test_steps_staged_ahead_keep_order_and_tables(seed: int, by_cells: bool) -> None:
    cfg = V4PrepareConfig(**asdict(Sizes()) | {"num_blocks": 16})
    _check_staged_ahead(PreparedSteps(cfg, by_cells=by_cells), seed, 50)


@by_cells
def test_steps_staged_ahead_on_a_device(kernel_memory: KernelMemory, by_cells: bool) -> None:
    if not kernel_memory.large and not by_cells:
        pytest.skip("for a GPU: an interpreted step takes half a second")
    cfg = _config(kernel_memory, num_blocks=16)
    build = PreparedSteps(cfg, kernel_memory, by_cells)
    _check_staged_ahead(build, 9, 300 if kernel_memory.large else 6)
