"""DeepSeek-V4 whose keys and entries are FP8 records: logits and tokens of a CPU that rounds."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.startup.capture import capture_graphs
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_v4_captured import SMALL
from tests.gpu_rig.device.test_v4_hits import logits_after, runner_of
from tests.gpu_rig.device.test_v4_model import (
    SMOOTH,
    device_model,
    device_runner,
    poison_pools,
    tokens_of,
    worst,
)
from tests.ops.v4_records import round_on_the_cpu
from tests.v4_model.cases import CASES, Case
from tests.v4_model.ours import load_model, make_runner, prompt_logits

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]
slow = pytest.mark.slow

FP8 = "fp8_ds_mla"


def test_logits_of_chunks(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts across windows, entries, blocks and the limit of the selection, in company."""
    case = CASES["mixed"]
    folder, prompts = case.write(tmp_path), [case.prompt(n) for n in (3, 40)]
    model, found = device_model(folder, rig, "float32"), []
    for chunk in (16, 7):
        runner = device_runner(model, rig, "float32", case.block_size, kv_cache_dtype=FP8)
        found.append(prompt_logits(runner, prompts, chunk))
    assert worst(*found) < 1e-5
    plain = prompt_logits(make_runner(load_model(folder), case.block_size), prompts, 40)
    round_on_the_cpu(monkeypatch)
    wanted = prompt_logits(make_runner(load_model(folder), case.block_size), prompts, 40)
    # a float32 sum in another order may round one code of a later key the other way
    assert worst([logits[:12] for logits in found[0]], [logits[:12] for logits in wanted]) < 1e-5
    assert worst(found[0], wanted) < 0.02
    assert worst(plain, wanted) > 0.1


@pytest.mark.parametrize(
    ("dtype", "is_captured"), [("bfloat16", True), pytest.param("float32", False, marks=slow)]
)
def test_logits_after_a_hit(rig: Rig, tmp_path: Path, dtype: str, is_captured: bool) -> None:
    """They are the bits of a row that has computed all its tokens, in the same chunks."""
    case = Case("small", SMALL, seed=41)
    model, cached = device_model(case.write(tmp_path), rig, dtype), 2 * case.block_size
    prompt, found = case.prompt(cached + 22), []
    for is_hit in (False, True):
        made = runner_of(rig, model, dtype, case.block_size, 96, is_captured, FP8)
        with made as runner:
            found.append([*logits_after(runner, prompt, cached, 2, is_hit=is_hit).values()])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("method", "sizes_of_graphs"), [("ngram", (2, 4)), pytest.param("", (), marks=slow)]
)
def test_tokens_of_the_engine(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    sizes_of_graphs: tuple[int, ...],
) -> None:
    """Requests that begin alike, one with several outputs, with drafts or with preemption."""
    round_on_the_cpu(monkeypatch)
    case = Case("smooth", SMOOTH, seed=43)
    folder, begin = case.write_served(tmp_path), case.prompt(45)
    prompts = [[*begin, 9], [*begin, 7, 8], [*begin[:17], *case.prompt(20)]]
    one, two = (SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, n=n) for n in (1, 2))
    sizes = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 64}
    with LLM(model=folder, device="cpu", **sizes) as llm:
        wanted = tokens_of(llm, prompts, one)
    own: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "kv_cache_dtype": "fp8"}
    own["max_num_batched_tokens"] = 24
    if method:
        own["speculative_config"] = {"method": method, "num_speculative_tokens": 2}
    else:
        own["num_gpu_blocks_override"] = 5
    with LLM(model=folder, device=rig.device, **sizes, **own) as llm:
        runner = llm.engine.runner
        if sizes_of_graphs:
            capture_graphs(runner, sizes_of_graphs, capture_of(rig))
        poison_pools(runner)
        assert tokens_of(llm, prompts[:1], two) == wanted[:1] * 2
        assert tokens_of(llm, prompts, one) == wanted
        assert llm.stats().prefix_cache_hits > 0
        assert (llm.stats().num_preemptions > 0) == (not method)
        runner.graphs = None
    gc.collect()
