"""bfloat16 activations through the backend on a device, for every share of the heads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fd_dsa.ops import providers
from tests.attention.bfloat16_case import Bfloat16World
from tests.kernel_memory import KernelMemory
from tests.strategies import make_batch

# first chunks below and past the selection of 4, a later chunk, decode with drafts, an idle row
MIXED = [(2, 0, 2), (0, 0, 0), (0, 70, 1), (5, 0, 5), (2, 63, 2), (0, 3, 2)]
DECODE = [(0, 70, 1), (0, 0, 0), (0, 3, 2), (0, 64, 1)]
# an interpreted program takes a group of 16 heads of a token
SLOW = pytest.mark.slow


@pytest.fixture
def memory(kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelMemory]:
    """A kernel memory whose tensors are treated as a GPU's, also in the interpreter."""
    if kernel_memory.name == "interpreter":
        monkeypatch.setattr(providers, "device_kind", lambda tensor: "gpu")
    with providers.asking_for({}):
        yield kernel_memory


@pytest.mark.parametrize("heads", [pytest.param(n, marks=SLOW) for n in (128, 64, 32)] + [16])
def test_a_mixed_step(memory: KernelMemory, heads: int) -> None:
    world = Bfloat16World(memory, make_batch(MIXED, 64), heads)
    world.step(world.rows).check()


@pytest.mark.parametrize("heads", [pytest.param(128, marks=SLOW), 16])
def test_a_decode_step(memory: KernelMemory, heads: int) -> None:
    world = Bfloat16World(memory, make_batch(DECODE, 64), heads)
    world.step(world.rows).check()


def test_all_heads_of_the_indexer(memory: KernelMemory) -> None:
    world = Bfloat16World(memory, make_batch(MIXED[2:5], 64), 3, index_heads=64)
    world.step(world.rows).check()


def test_a_selection_of_all_keys(memory: KernelMemory) -> None:
    world = Bfloat16World(memory, make_batch(MIXED, 64), 16, topk=128)
    world.step(world.rows).check()
