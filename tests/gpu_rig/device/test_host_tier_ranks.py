"""Evicted prefix blocks in page-locked memory of two ranks: each copies one part, and both get all.

The ranks are the threads of `test_ranks`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa import SamplingParams
from fd_dsa.distributed.host import Shared
from fd_dsa.engine.caches import DSACaches
from fd_dsa.engine.mtp_drafter import DeviceMtpDrafter
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.startup.host_tier import add_host_tier, make_block_stores
from tests.engine.fakes import run_all
from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_ranks import (
    MAX_LEN,
    WITH_LAYER,
    Driver,
    Followed,
    Ranks,
    Turns,
    Worker,
    engine_of,
    on_device,
)

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.slow]

NUM_BLOCKS, NUM_SLOTS = 3, 12
PROMPTS = [[token + place % 7 for place in range(35)] for token in (20, 40)]


def make(kind: type[Any], group: Turns, rig: Rig) -> Any:
    """Make the runner of a rank, with host memory."""
    runner = on_device(kind, group, rig, (), WITH_LAYER)
    # rows that no step writes are equal on both ranks, too
    for cache in runner.caches:
        cache.copy_(paddle.zeros(cache.shape, cache.dtype).to(cache.place), False)
    memory = SimpleNamespace(num_blocks=NUM_BLOCKS, num_host_blocks=NUM_SLOTS, num_host_snapshots=0)
    plan: Any = SimpleNamespace(memory=memory, device=rig.device, caches=DSACaches)
    runner.block_store, _ = make_block_stores(runner, plan, group)
    return runner


def answers(runner: Any) -> list[tuple[list[int], int]]:
    """Tokens of the prompts, of the first one again, and their tokens from host memory."""
    engine = engine_of(runner, SpecDecoder(DeviceMtpDrafter(runner), 1), NUM_BLOCKS)
    plan: Any = SimpleNamespace(max_model_len=MAX_LEN)
    add_host_tier(engine, runner.block_store, plan)
    found = []
    for number, prompt in enumerate([*PROMPTS, PROMPTS[0]]):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        engine.add_request(str(number), prompt, params)
        last = run_all(engine)[str(number)][-1]
        found.append((last.token_ids, last.num_host_cached_tokens))
    return found


def test_blocks_come_back_whole_on_both_ranks(rig: Rig) -> None:
    if rig.is_real:
        pytest.skip("its ranks are processes")
    shared = Shared.create(2)
    first, second = Turns(0, shared), Turns(1, shared)
    with Turns.turn:
        other = Followed(rig, second, lambda: make(Worker, second, rig))
        runner = make(Driver, first, rig)
        runner.lead(Ranks(first))
        with rig.counting() as counted:
            found = answers(runner)
        first.send(b"")
    other.join()
    # the first prompt again, whose blocks the second one had evicted
    assert found[0][0] == found[2][0] != found[1][0]
    assert [count for _, count in found] == [0, 0, 32]
    assert counted.delta["h2d_async"] > 0 and counted.delta["d2h_async"] > 0
    # rank 1 has loaded its own part of the blocks, and has got that of rank 0
    (worker,) = other.workers
    assert worker.block_store.num_done == runner.block_store.num_done > 0
    for own, one in zip(runner.caches, worker.caches, strict=True):
        np.testing.assert_array_equal(own.numpy()[:NUM_BLOCKS], one.numpy()[:NUM_BLOCKS])
    first.close()
