"""Evicted prefix blocks in host memory that several ranks share, on ranks that are processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("paddle")

from fd_dsa import LLM, SamplingParams
from fd_dsa.errors import RankError
from fd_dsa.startup.ranks import Ranks
from tests.distributed.test_llm import RANK, ranks_left
from tests.distributed.test_server import FLAGS, ask, nothing_is_left, rank_of
from tests.one_order import check_equal_bits
from tests.proc import children
from tests.serve.conftest import wait_until
from tests.serve.processes import serving

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
PROMPTS = [[7 + place * step % 300 for place in range(180)] for step in (1, 3, 5, 7)]
# two requests fit, so that two others are evicted
SIZES: dict[str, Any] = {"device": "cpu", "max_num_seqs": 2, "max_model_len": 256}
SIZES |= {"max_num_batched_tokens": 128, "num_gpu_blocks_override": 7}
TIER = {"kv_offload_bytes": "64M", "tensor_parallel_size": 2}
MTP = {"method": "mtp", "num_speculative_tokens": 2}


def second_turns(llm: LLM) -> list[tuple[Any, ...]]:
    """Outputs of prompts that have been computed before, two at a time."""
    llm.generate(PROMPTS, GREEDY)
    outputs = llm.generate([[*prompt[:170], 9, 8] for prompt in PROMPTS], GREEDY)
    return [(one.token_ids, one.logprobs, one.finish_reason) for one in outputs]


# of a process with FD_DSA_BATCH_INVARIANT=1 from its start, as its ranks have it
COMPARE = """
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
from tests.distributed.test_host_tier import compare_sizes
compare_sizes({kv_cache_dtype!r}, {drafts!r})
print("equal")
"""


def compare_sizes(kv_cache_dtype: str, drafts: Any) -> None:
    """Assert that answers with hits, with few or none of them, and without a tier are equal."""
    options = SIZES | {"kv_cache_dtype": kv_cache_dtype, "speculative_config": drafts}
    found = []
    for size, least_hits in (("64M", 300), ("1500K", 0), ("0", 0)):
        # measured costs decide on the number of drafts
        with (
            patch("fd_dsa.startup.build.measure_step_costs", lambda *_: None),
            LLM(**options | TIER | {"kv_offload_bytes": size}) as llm,
        ):
            found.append(second_turns(llm))
            stats = llm.stats()
            assert stats.prefix_cache_host_hits >= least_hits
            # a store of one block, or of four in FP8, is full
            assert stats.host_cache_usage == 1 or size != "1500K"
            assert (stats.num_accepted_tokens > 0) == (drafts == MTP)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("kv_cache_dtype", "drafts"),
    [
        ("float32", MTP),
        pytest.param("float32", "none", marks=pytest.mark.slow),
        pytest.param("fp8_ds_mla", MTP, marks=pytest.mark.slow),
    ],
)
def test_no_bit_of_an_answer_depends_on_host_memory(kv_cache_dtype: str, drafts: Any) -> None:
    check_equal_bits(COMPARE.format(kv_cache_dtype=kv_cache_dtype, drafts=drafts))


# rank 1 with other copies of blocks
IN_COPY = """
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
from fd_dsa.runner.block_store import HostBlockStore
def copy(self, loads, block, slot, count):
    if loads:
        {what}
HostBlockStore.copy = copy
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"ended by signal 9 \(SIGKILL\)"),
        ("raise RuntimeError('the copy failed')", "failed: RuntimeError: the copy failed"),
    ],
    ids=["killed", "failed"],
)
def test_a_rank_that_ends_in_a_copy_is_named(
    what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = set(os.listdir("/dev/shm"))
    program = RANK.format(patch=IN_COPY.format(what=what))
    monkeypatch.setattr(Ranks, "COMMAND", (sys.executable, "-c", textwrap.dedent(program)))
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(**SIZES | TIER, speculative_config="none"))
        with pytest.raises(RankError, match=rf"^rank 1 \(process \d+\) {message}"):
            second_turns(llm)
    assert ranks_left() == []
    assert set(os.listdir("/dev/shm")) <= files


def test_a_copy_that_fails_on_rank_0_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks have made the copy, so nobody can go on."""

    def copy(*_: object) -> None:
        raise OSError("no page is free")

    monkeypatch.setattr("fd_dsa.runner.block_store.HostBlockStore.copy", copy)
    said = "rank 0 failed in a step: OSError: no page is free"
    with (
        LLM(**SIZES | TIER, speculative_config="none") as llm,
        pytest.raises(RankError, match=said),
    ):
        second_turns(llm)
    assert ranks_left() == []


# rank 1 has no memory for the blocks
WITHOUT = """
import fd_dsa.runner.block_store as block_store
from fd_dsa.errors import DeviceError
def take(*_):
    raise DeviceError("cuMemHostAlloc: out of memory")
block_store.HostBlockStore = take
"""


def test_one_rank_without_memory_turns_the_tier_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = RANK.format(patch=WITHOUT)
    monkeypatch.setattr(Ranks, "COMMAND", (sys.executable, "-c", textwrap.dedent(program)))
    with LLM(**SIZES | TIER, speculative_config="none") as llm:
        assert len(second_turns(llm)) == len(PROMPTS)
        assert llm.stats().prefix_cache_host_hits == 0
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    said = "rank 1: cuMemHostAlloc: out of memory; no prefix block is kept in host memory"
    assert warnings == [f"--kv-offload-bytes: {said}"]


# a server whose loads take a while on rank 0, so that rank 1 waits for their blocks
SLOW = """
    from pathlib import Path
    del sys.modules["fd_dsa.startup.build"]
    from fd_dsa.startup.build import build_engine
    from fd_dsa.runner.block_store import HostBlockStore
    copy = HostBlockStore.copy
    def slow(self, loads, *rest):
        if loads:
            Path("loads").touch()
            time.sleep(1)
        copy(self, loads, *rest)
    HostBlockStore.copy = slow
    return build_engine(config, progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["SIGTERM", "rank killed"])
def test_an_end_in_a_copy_leaves_nothing(what: str, tmp_path: Path) -> None:
    files = set(os.listdir("/dev/shm"))
    more = ("--num-gpu-blocks-override", "9", "--kv-offload-bytes", "64M")
    with serving(tmp_path, *FLAGS, *more, body=SLOW) as server, ThreadPoolExecutor(1) as threads:
        expected = ask(server, prompt=PROMPTS[0], max_tokens=200)
        for prompt in PROMPTS[1:]:
            ask(server, prompt=prompt, max_tokens=200)
        pids = children(server.process.pid)
        answer = threads.submit(ask, server, prompt=PROMPTS[0], max_tokens=200)
        wait_until((tmp_path / "loads").exists, 30)
        if what == "SIGTERM":
            server.process.send_signal(signal.SIGTERM)
            assert answer.result()["choices"] == expected["choices"]
            assert server.process.wait(30) == 0
        else:
            os.kill(rank_of(server), signal.SIGKILL)
            assert "engine has failed" in answer.result()["error"]["message"]
            assert server.process.wait(30) == 1
        nothing_is_left(pids, files)
