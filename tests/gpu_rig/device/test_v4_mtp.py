"""DeepSeek-V4's layer for multi-token prediction on the device: the CPU's logits and drafts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.startup import build
from fd_dsa.startup.capture import capture_graphs
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_mtp import MOST, DeviceDrafter, HostDrafter
from tests.gpu_rig.device.test_v4_captured import RELEASED, SMALL
from tests.gpu_rig.device.test_v4_model import (
    SMOOTH,
    device_model,
    device_runner,
    poison_pools,
    tokens_of,
    worst,
)
from tests.v4_model.cases import CSA, Case
from tests.v4_model.drafts import MTP
from tests.v4_model.ours import load_model, make_runner, run_step

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]
slow = pytest.mark.slow

ROW = 1
# tokens 2 to 4 alone come, so that drafts of random weights are often right
FEW = {"logit_bias": {2: 50.0, 3: 50.0, 4: 50.0}}
# one layer, with entries and states, in which nothing is chosen by scores
TINY = SMOOTH | {"layer_types": [CSA], "num_hidden_layers": 1, "n_routed_experts": 3}
# in bfloat16 no expert is chosen
MODELS = {
    "small": SMALL,
    "released": RELEASED,
    "smooth": SMOOTH | {"num_experts_per_tok": 6},
}


def on_device(runner: Any, next_ids: list[int], hidden: Any = None) -> tuple[Any, np.ndarray]:
    """Streams and logits of the layer over the newest step of a device."""
    step, mtp = runner.forward_meta, runner.model.mtp
    with paddle.no_grad():
        ids = paddle.to_tensor(np.array(next_ids, np.int32), place=step.token_ids.place)
        streams = mtp(ids, step.hidden_states if hidden is None else hidden, step)
        return streams, mtp.compute_logits(streams).numpy()


@pytest.mark.parametrize(
    ("name", "dtype", "sizes", "bound"),
    [
        ("small", "float32", (13, 9, 1, 2), 1e-4),
        ("smooth", "bfloat16", (13,), 0.03),
        pytest.param("released", "float32", (40, 40, 40, 12), 1e-4, marks=slow),
    ],
)
def test_logits_of_chunks(
    name: str, dtype: str, sizes: tuple[int, ...], bound: float, rig: Rig, tmp_path: Path
) -> None:
    """Prompts in chunks, across windows, and further drafts after them."""
    case = Case(name, MODELS[name] | MTP, seed=61)
    folder, prompt = case.write(tmp_path), case.prompt(sum(sizes) + 1)
    cpu = make_runner(load_model(folder, mtp=True), case.block_size, max_drafts=MOST)
    model = device_model(folder, rig, dtype, mtp=True)
    runner = device_runner(model, rig, dtype, case.block_size, 3, 160, 0, MOST)
    begin, found, wanted = 0, [], []
    for size in sizes:
        end = begin + size
        for one in (cpu, runner):
            run_step(one, {ROW: (prompt[begin:end], begin)})
        next_ids = prompt[begin + 1 : end + 1]
        wanted.append(cpu.predict_more(np.array(next_ids), range(size)))
        streams, logits = on_device(runner, next_ids)
        found.append(logits)
        begin = end
    assert worst(found, wanted) < bound
    # another draft, of any token, on the layer's own streams
    for one in (cpu, runner):
        one.input_batch.begin_step()
        one.input_batch.add_row(ROW, [7], begin, is_prefill=False)
    wanted = [cpu.predict_more(np.array([7]), [0], [size - 1])]
    runner.initialize_forward_meta()
    _, logits = on_device(runner, [7], streams[size - 1 : size])
    assert worst([logits], wanted) < bound


class Run(NamedTuple):
    """Answers and drafts of an engine.

    Attributes:
        tokens: answers to all prompts, then to what follows them.
        drafts: those that steps verified, by request and position of the first one.
        num_ahead: drafts of steps that were in flight.
    """

    tokens: list[list[int]]
    drafts: dict[tuple[str, int], list[int]]
    num_ahead: int
    stats: Any
    counters: Any


def run(
    folder: Path,
    prompts: list[list[int]],
    device: str,
    prepare: Callable[[Any], None] | None = None,
    *,
    goes_on: bool,
    **fields: Any,
) -> Run:
    """Answer prompts, and if asked the next prompts of the same chats."""
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, **FEW)
    sizes: dict[str, Any] = {"block_size": 16, "max_num_seqs": 3, "max_model_len": 48}
    sizes["max_num_batched_tokens"] = 24
    with LLM(model=folder, device=device, **sizes, **fields) as llm:
        runner, spec_decoder = llm.engine.runner, llm.engine.spec_decoder
        drafter: Any = None
        if spec_decoder is not None:
            drafter = HostDrafter(runner) if device == "cpu" else DeviceDrafter(runner)
            spec_decoder.drafter = drafter
        if prepare is not None:
            prepare(runner)
        tokens = tokens_of(llm, prompts, params)
        if goes_on:
            next_prompts = [
                [*prompt, *answer, 9] for prompt, answer in zip(prompts, tokens, strict=True)
            ]
            tokens += tokens_of(llm, next_prompts, params)
        stats, runner.graphs = llm.stats(), None
    gc.collect()
    drafts, num_ahead = (drafter.drafts, drafter.num_ahead) if drafter else ({}, 0)
    return Run(tokens, drafts, num_ahead, stats, runner.counters)


FORMS: dict[str, dict[str, Any]] = {
    "hits": {"num_gpu_blocks_override": 16},
    "preemption": {"num_gpu_blocks_override": 3},
}


@pytest.mark.parametrize(
    ("form", "sizes_of_graphs"),
    [
        ("hits", (9,)),
        ("preemption", ()),
        pytest.param("hits", (), marks=slow),
        pytest.param("preemption", (9,), marks=slow),
    ],
)
def test_answers_and_drafts(
    form: str,
    sizes_of_graphs: tuple[int, ...],
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers are those without drafts, and drafts the CPU's, in steps ahead of their tokens."""
    costs = DraftCosts({1: [1.0, 1.01, 1.02]})
    monkeypatch.setattr(build, "measure_step_costs", lambda *_: costs)
    case, goes_on = Case("tiny", TINY | MTP, seed=62), form == "hits"
    folder, begin = case.write_served(tmp_path), case.prompt(18)
    # the second answer passes the end of a block
    prompts = [[*begin, 9], case.prompt(12), [*begin, 7, 8]]
    if form == "preemption":
        # all answers pass the end of a block
        prompts = [prompt[-12:] for prompt in prompts]
    mtp = {"speculative_config": {"method": "mtp", "num_speculative_tokens": MOST}}
    plain = run(folder, prompts, "cpu", goes_on=goes_on)
    host = run(folder, prompts, "cpu", goes_on=goes_on, **mtp)
    assert host.tokens == plain.tokens

    def prepare(runner: Any) -> None:
        if sizes_of_graphs:
            capture_graphs(runner, sizes_of_graphs, capture_of(rig))
        poison_pools(runner)

    own = {"dtype": "float32", "enforce_eager": True, **FORMS[form], **mtp}
    found = run(folder, prompts, rig.device, prepare, goes_on=goes_on, **own)
    assert found.tokens == plain.tokens
    stats = found.stats
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 0 and found.num_ahead > 0
    assert (stats.num_preemptions > 0) == (form == "preemption")
    assert (stats.prefix_cache_hits > 0) or form == "preemption"
    assert (found.counters.graph_steps["decode"] > 0) == bool(sizes_of_graphs)
    both = found.drafts.keys() & host.drafts.keys()
    assert len(both) > 8
    for name in both:
        count = min(len(found.drafts[name]), len(host.drafts[name]))
        assert found.drafts[name][:count] == host.drafts[name][:count], name
