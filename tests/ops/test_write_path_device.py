"""Write path on a GPU: large addresses, captured launches, repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernel_memory import POISON, KernelMemory, open_memory
from tests.ops.cache_write_case import BLOCK, arguments, assert_same_bytes, make_case, on_cpu

pytestmark = pytest.mark.gpu
# bytes of a latent block and of an indexer block; caches just past 2^31 bytes
LATENT_BLOCK, INDEX_BLOCK = BLOCK * 656, BLOCK * 132
REPEATS = 10_000


@pytest.fixture
def memory() -> KernelMemory:
    """CUDA memory of torch: only torch captures graphs here."""
    return open_memory("torch")


def poisoned_on_device(shape: tuple[int, ...]) -> Any:
    """A large cache, poisoned without a copy on the host."""
    import torch

    return torch.full(shape, POISON, device="cuda", dtype=torch.uint8)


def write(given: tuple[Any, ...]) -> None:
    """The kernel's write."""
    from fd_dsa.ops.cache_write.triton_kernel import write_caches

    write_caches(*given)


def test_caches_past_two_gigabytes(memory: KernelMemory) -> None:
    m, case = memory, make_case(BLOCK)
    wanted = [cache[:1] for cache in on_cpu(case.changed(slot_mapping=np.arange(BLOCK)))]
    # the indexer's cache passes 2^31 bytes much later than the latent's
    num_blocks = 2**31 // INDEX_BLOCK + 2
    index = poisoned_on_device((num_blocks, BLOCK, 132))
    last = case.changed(slot_mapping=(num_blocks - 1) * BLOCK + np.arange(BLOCK), kv_a=None)
    given = arguments(m, last.changed(num_blocks=1))
    write((*given[:6], index, given[7]))
    assert np.array_equal(m.get(index[-1:]), wanted[1])
    assert bool((index[:-1] == POISON).all())
    del index
    num_blocks = 2**31 // LATENT_BLOCK + 2
    latent = poisoned_on_device((num_blocks, 1, BLOCK, 656))
    last = case.changed(slot_mapping=(num_blocks - 1) * BLOCK + np.arange(BLOCK), index_k=None)
    given = arguments(m, last.changed(num_blocks=1))
    write((*given[:5], latent, *given[6:]))
    assert np.array_equal(m.get(latent[-1:]), wanted[0])
    assert bool((latent[:-1] == POISON).all())


def test_captured_write_with_padding(memory: KernelMemory) -> None:
    import torch

    m, cases = memory, [make_case(32, seed=seed) for seed in range(3)]
    given = arguments(m, cases[0])
    write(given)
    m.sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(given)
    for num_live, case in zip((32, 7, 0), cases, strict=True):
        slots = np.where(np.arange(32) < num_live, case.slot_mapping, -1)
        positions = np.where(slots < 0, 0, case.position_ids)
        step = cases[0].changed(slot_mapping=slots, position_ids=positions, kv_a=case.kv_a)
        for tensor, array in zip(given, (step.kv_a, None, positions, slots), strict=False):
            if array is not None:
                tensor.copy_(m.put(array))
        for cache in given[5:7]:
            cache.fill_(POISON)
        graph.replay()
        assert_same_bytes((m.get(given[5]), m.get(given[6])), on_cpu(step))


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [7, 4133])
def test_repeated_writes_are_the_same(memory: KernelMemory, num_tokens: int) -> None:
    import torch

    given = arguments(memory, make_case(num_tokens))
    write(given)
    first = [cache.clone() for cache in given[5:7]]
    differing = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(REPEATS):
        for cache in given[5:7]:
            cache.fill_(POISON)
        write(given)
        for cache, want in zip(given[5:7], first, strict=True):
            differing += (cache != want).any()
    assert int(differing) == 0
