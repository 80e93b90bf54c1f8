"""A group of processes with a GPU each, on GPUs: sums, repeats, graphs, a rank that is absent.

The rig's processes load their plug-in themselves, so both kinds run in one session:
`pytest -m gpu tests/distributed`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.distributed.gpu_ranks import num_gpus, run_ranks

pytestmark = pytest.mark.gpu
SIZES = [size for size in (2, 4, 8) if size <= num_gpus()]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """Built once, before the ranks ask for it."""
    from custom_ops.build_library import build_library

    if not SIZES:
        pytest.skip(f"{num_gpus()} GPUs on this machine, 2 are needed")
    build_library()


def _run(size: int, memory: str, check: str) -> list[Any]:
    if memory == "rig":
        if importlib.util.find_spec("paddle") is None:
            pytest.skip("not installed: paddle")
        from tests.gpu_rig.build import build

        # before two ranks build it at the same time
        build("real")
    return run_ranks("tests.distributed.rank_checks", size, memory, check, timeout_s=120)


@pytest.mark.parametrize("memory", ["torch", "rig"])
@pytest.mark.parametrize("check", ["sums", "repeats"])
@pytest.mark.parametrize("size", SIZES or [2])
def test_all_ranks_have_the_same_bits(size: int, memory: str, check: str) -> None:
    first, *others = _run(size, memory, check)
    assert all(other == first for other in others)


@pytest.mark.parametrize("size", SIZES or [2])
def test_residual_and_norm_in_the_same_launch(size: int) -> None:
    first, *others = _run(size, "rig", "fused")
    assert all(other == first for other in others)


@pytest.mark.parametrize("memory", ["torch", "rig"])
@pytest.mark.parametrize("size", SIZES or [2])
def test_a_rank_that_does_not_come_is_named(size: int, memory: str) -> None:
    said = f"rank {size - 1} did not come to an all-reduce for 1 s"
    assert _run(size, memory, "absent") == [said] * (size - 1) + ["absent"]
