"""Processes with a GPU each: sums, repeats of a graph, the fused form, a rank that is absent.

The rig's processes load their plug-in themselves, so both kinds run in one session:
`pytest -m gpu tests/distributed`.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.distributed.gpu_ranks import num_gpus, run_ranks

pytestmark = pytest.mark.gpu
TIMEOUT_S = 150
SIZES = [size for size in (2, 4, 8) if size <= num_gpus()]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """Built once, before the ranks ask for it."""
    from custom_ops.build_library import build_library

    if not SIZES:
        pytest.skip(f"{num_gpus()} GPUs on this machine, 2 are needed")
    build_library()


@pytest.mark.parametrize("memory", ["torch", "rig"])
@pytest.mark.parametrize("size", SIZES or [2])
def test_all_ranks_have_the_same_bits(size: int, memory: str) -> None:
    checks = ["sums", "repeats", "absent"]
    if memory == "rig":
        if importlib.util.find_spec("paddle") is None:
            pytest.skip("not installed: paddle")
        from tests.gpu_rig.build import build

        # before two ranks build it at the same time
        build("real")
        checks.insert(0, "fused")
    module = "tests.distributed.rank_checks"
    found = run_ranks(module, size, memory, *checks, timeout_s=TIMEOUT_S)
    said = f"rank {size - 1} did not come to an all-reduce for 1 s"
    assert [one.pop("absent") for one in found] == [said] * (size - 1) + ["absent"]
    assert all(one == found[0] for one in found)
