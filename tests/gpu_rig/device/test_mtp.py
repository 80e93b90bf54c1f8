"""Drafts of the layer for multi-token prediction on a device: outputs are those without drafts."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.device.transfers import on_host
from fd_dsa.engine.batch import Drafts, ScheduledBatch
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.mtp_drafter import DeviceMtpDrafter, MtpDrafter
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.prompt_lookup import PromptLookup
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import StepSampler
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.runner.device_steps import DeviceSteps
from fd_dsa.startup import measure
from fd_dsa.startup.capture import capture_graphs
from fd_dsa.startup.warm_up import warm_up_kernels
from fd_dsa.triton_runtime.kernel import Kernel
from fd_dsa.triton_runtime.launch import BoundLaunch
from tests.engine.fakes import byte_tokenizer, run_all
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.transfers import counted_transfers
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import V32, tiny_model

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]

FIELDS = V32 | {"num_nextn_predict_layers": 1}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 0.7, "top_p": 0.9, "ignore_eos": True},
    {"temperature": 0, "repetition_penalty": 1.3, "max_tokens": 5},
    {"temperature": 0.5, "bad_words": ["ab", "Bc"], "min_tokens": 4, "max_tokens": 6},
]
# a, b and c alone come, so that drafts stand often, and others are refused by masks
ABC = {"logit_bias": {2: 50.0, 3: 50.0, 4: 50.0}}
# the first is plain; the host makes masks for the next ones, and samples steps of the last
MASKED: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {**ABC, "temperature": 0, "structured_outputs": StructuredOutputsParams(regex="(ab?c?)*")},
    {**ABC, "temperature": 0.7, "bad_words": ["ab", "ca", "bbb"]},
    {**ABC, "temperature": 1, "structured_outputs": StructuredOutputsParams(regex="([ab]*c){4}")},
    {**ABC, "temperature": 1, "bad_words": ["b", "aa"], "reasoning": Reasoning("", "ba")},
    {"temperature": 0, "logprobs": 1, "max_tokens": 3},
]
MOST, SEED, NUM_BLOCKS = 2, 3, 6


class Watching:
    """Has all drafts made that there may be, and remembers those that steps verified.

    Attributes:
        drafts: tokens by request and the position of the first one.
        num_ahead: drafts of steps that were in flight.
        num_after: drafts of steps that the host sampled, after such a step.
    """

    _runner: Any
    num_ahead = num_after = 0
    was_ahead = False

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        runner, begin = self._runner, 0
        if not hasattr(self, "drafts"):
            self.drafts: dict[tuple[str, int], list[int]] = {}
        num_drafts = sum(map(len, batch.drafts.values()))
        if batch.is_in_flight:
            self.num_ahead += num_drafts
        elif self.was_ahead and batch.future is None:
            self.num_after += num_drafts
        self.was_ahead = batch.is_in_flight
        meta, lengths = runner.forward_meta, runner.input_batch.num_scheduled_tokens
        ids, cached = meta.token_ids, meta.num_computed_tokens
        if runner.device_steps is not None:
            # where the tokens on their way are, and how many stood
            ids, cached = (on_host(x, np.empty(x.shape, np.int32)) for x in (ids, cached))
        for request, row in zip(batch.requests, lengths.nonzero()[0].tolist(), strict=True):
            if request in batch.drafts:
                name = request.state.request_id, int(cached[row]) + 1
                self.drafts[name] = ids[begin + 1 : begin + lengths[row]].tolist()
            begin += int(lengths[row])
        proposals: dict[Request, Drafts] = super().propose(  # type: ignore[misc]
            batch, dict.fromkeys(counts, MOST)
        )
        return proposals


class HostDrafter(Watching, MtpDrafter):
    """Of a CPU."""


class DeviceDrafter(Watching, DeviceMtpDrafter):
    """Of a device."""


def make_runner(device: str, has_layer: bool = True) -> ModelRunner:
    """Three rows of at most six blocks of eight tokens, chunks of twelve."""
    model = tiny_model(FIELDS, seed=2, device=device, mtp=() if has_layer else None)
    layout = model.config.cache_layout("float32", 8)
    batch = InputBatch(3, 12, 6, 8)
    runner = dsa_runner(model, batch, layout, NUM_BLOCKS, device, max_drafts=MOST)
    for cache in runner.caches:
        poison = np.full(cache.shape, np.nan, np.float32)
        cache.copy_(paddle.to_tensor(poison, place=cache.place), False)
    return runner


def make_engine(
    runner: ModelRunner, spec_decoder: SpecDecoder | None, longest: int = 48
) -> LLMEngine:
    """The engine of that runner, for requests of so many tokens."""
    return LLMEngine(
        runner,
        byte_tokenizer(),
        num_blocks=NUM_BLOCKS,
        max_model_len=longest,
        eos_token_ids=[1],
        spec_decoder=spec_decoder,
    )


def count_replay(replays: Counter[int], length: int, replay: Callable[[], None]) -> None:
    """Count a replay of a graph by the longest row that it reaches to."""
    replays[length] += 1
    replay()


def answers(
    device: str,
    rig: Rig | None = None,
    is_drafted: bool = True,
    costs: DraftCosts | None = None,
    kinds: list[dict[str, Any]] = KINDS,
    drafter: Any = None,
    **more: Any,
) -> tuple[dict[str, RequestOutput], LLMEngine, Any]:
    """The ends of a request of each kind, with chunks and few blocks; with a rig, from graphs."""
    runner = make_runner(device, is_drafted and drafter is None)
    prompts = Counter[int]()
    if rig is not None:
        capture_graphs(runner, (6,), capture_of(rig), prompt_sizes=(12,))
        graphs: Any = runner.graphs
        for padded in [padded for padded in graphs if padded.limits is not None]:
            replay: Any = partial(count_replay, prompts, padded.max_seqlen_k, graphs[padded].replay)
            graphs[padded] = graphs[padded]._replace(replay=replay)
    if drafter is None:
        drafter = HostDrafter(runner) if device == "cpu" else DeviceDrafter(runner)
    engine = make_engine(runner, SpecDecoder(drafter, MOST, costs) if is_drafted else None)
    draw = np.random.default_rng(SEED)
    for number, kind in enumerate(kinds):
        prompt = draw.integers(2, 40, 9 + 3 * number).tolist()
        params = SamplingParams(**{"max_tokens": 18, "seed": number, **kind, **more})
        engine.validate(prompt, params)
        engine.add_request(str(number), prompt, params)
    ends = {name: outputs[-1] for name, outputs in run_all(engine).items()}
    assert len(prompts) == (2 if rig is not None else 0)
    runner.graphs = None
    gc.collect()
    return ends, engine, drafter


@pytest.mark.parametrize(
    ("captured", "more"),
    [(False, {}), (True, {}), (True, {"logprobs": 1})],
    ids=["eager", "graphs", "sampled on the host"],
)
def test_outputs_are_those_without_drafts_and_drafts_those_of_the_cpu(
    rig: Rig, captured: bool, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, _ = answers("cpu", is_drafted=False, **more)
    if not captured:
        enqueue, count = StepSampler.enqueue, itertools.count()
        # the host samples some steps, though the one before is in flight
        often: Any = lambda *given: next(count) % 4 != 0 and enqueue(*given)  # noqa: E731
        monkeypatch.setattr(StepSampler, "enqueue", often)
    _, _, on_host = answers("cpu", **more)
    found, engine, drafter = answers(rig.device, rig if captured else None, **more)
    assert engine.stats().num_accepted_tokens and engine.stats().num_preemptions
    assert bool(drafter.num_ahead) == (not more) and (captured or drafter.num_after)
    for name, output in found.items():
        assert output.token_ids == plain[name].token_ids, name
        assert output.finish_reason == plain[name].finish_reason
    both = drafter.drafts.keys() & on_host.drafts.keys()
    # a device draws drafts without masks
    both = {name for name in both if "bad_words" not in KINDS[int(name[0])]}
    assert len(both) > 12
    for name in both:
        count = min(len(drafter.drafts[name]), len(on_host.drafts[name]))
        assert drafter.drafts[name][:count] == on_host.drafts[name][:count], name


@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_rows_whose_masks_the_host_makes_have_drafts(rig: Rig, method: str) -> None:
    plain, _, _ = answers("cpu", is_drafted=False, kinds=MASKED)
    own = None if method == "mtp" else PromptLookup(2, 1)
    found, engine, _ = answers(rig.device, rig, kinds=MASKED, drafter=own)
    assert engine.stats().num_mask_waits or method == "ngram"
    for name, output in found.items():
        assert output.token_ids == plain[name].token_ids, name
        assert output.finish_reason == plain[name].finish_reason
    # bad words come in the reasoning only
    _, _, answer = found["4"].text.partition("ba")
    assert answer and "b" not in answer and "aa" not in answer
    for name in ("1", "2"):
        assert 0 < found[name].num_accepted_tokens < found[name].num_draft_tokens, name


class FixedDrafts(DeviceMtpDrafter):
    """Drafts as many tokens of each request."""

    count = 1

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        return super().propose(batch, dict.fromkeys(counts, self.count))


@pytest.mark.parametrize(
    ("count", "bad_words"),
    [(1, None), (2, None), (1, ["ab"])],
    ids=["one", "two", "one with masks"],
)
def test_a_step_with_drafts_is_a_few_graphs_one_copy_in_one_out_and_one_wait(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, count: int, bad_words: list[str] | None
) -> None:
    """With masks these are a copy in more, and the drafts one out; no wait is."""
    runner, replays = make_runner(rig.device), Counter[str]()
    capture_graphs(runner, (4,), capture_of(rig))
    is_open = [True]

    def counted(name: str, replay: Callable[..., None]) -> Callable[..., None]:
        def replayed(*given: int) -> None:
            replays[name] += 1
            # where graphs are the work itself, its launches are the graph's
            is_open[0] = False
            replay(*given)
            is_open[0] = True

        return replayed

    assert runner.graphs is not None
    for padded, step in runner.graphs.items():
        graphs = {
            name: counted(name, getattr(step, name)) for name in ("replay", "sample", "draft")
        }
        runner.graphs[padded] = step._replace(**graphs)
    for padded_drafts, replay in runner.graphs.drafts.items():
        runner.graphs.drafts[padded_drafts] = counted("more", replay)
    for kind, name in ((Kernel, "__getitem__"), (BoundLaunch, "__call__")):
        original: Any = getattr(kind, name)

        def launch(*given: Any, original: Any = original, **named: Any) -> Any:
            replays["launches"] += is_open[0]
            return original(*given, **named)

        monkeypatch.setattr(kind, name, launch)
    drafter = FixedDrafts(runner)
    drafter.count = count
    engine = make_engine(runner, SpecDecoder(drafter, count))
    params = SamplingParams(temperature=0, max_tokens=24, bad_words=bad_words)
    engine.add_request("r", [*range(2, 12)], params)
    copies, num_steps, num_more = 2 if bad_words else 1, 0, 0
    while engine.has_unfinished_requests():
        before = engine.in_flight
        replays.clear()
        with counted_transfers() as transfers:
            engine.step()
        launched = engine.in_flight
        if before and before.drafts and launched and launched.drafts:
            num_steps += 1
            has_more = any(len(drafts) > 1 for drafts in engine.scheduler.proposals.values())
            num_more += has_more
            kinds = ["replay", "sample", "draft", *["more"] * has_more]
            assert +replays == Counter(kinds)
            transfers = Counter({k: n for k, n in transfers.items() if not k.endswith("bytes")})
            copied = "h2d_async", "d2d_async", "d2h_async"
            assert transfers == dict.fromkeys(copied, copies) | {"event_syncs": 1}
    assert num_steps > 5 and (num_more > 5) == (count > 1)
    runner.graphs = None
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("more", [{}, {"logprobs": 2}], ids=["in flight", "sampled on the host"])
def test_no_bit_depends_on_drafts(rig: Rig, more: dict[str, Any]) -> None:
    plain, _, _ = answers(rig.device, is_drafted=False, temperature=0, **more)
    found, engine, drafter = answers(rig.device, temperature=0, **more)
    assert engine.stats().num_accepted_tokens and bool(drafter.num_ahead) == (not more)
    for name, output in found.items():
        assert output.token_ids == plain[name].token_ids, name
        assert output.logprobs == plain[name].logprobs, name


def test_steps_in_which_no_request_drafts_leave_the_layer_out(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, _ = answers("cpu", is_drafted=False)
    runs, queue = [], DeviceSteps.draft
    monkeypatch.setattr(DeviceSteps, "draft", lambda *one: runs.append(one) or queue(*one))
    # with it two drafts pay for three requests while they mostly stand
    costs = DraftCosts({1: [1.0, 1.6, 1.65], 3: [1.13, 1.8, 1.95]})
    found, engine, drafter = answers(rig.device, costs=costs)
    # also those that were in flight when their requests left
    assert engine.stats().num_draft_tokens == drafter.num_ahead
    assert {k: o.token_ids for k, o in found.items()} == {k: o.token_ids for k, o in plain.items()}
    assert 0 < len(runs) < 0.7 * engine.stats().num_steps


def test_a_start_runs_the_layer_before_any_request(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # kernels may be interpreted
    monkeypatch.setattr(measure, "MAX_MEASURING_S", 60.0)
    monkeypatch.setattr(measure, "STEPS_AHEAD", 16 if rig.is_real else 4)
    # few tokens before the measured ones
    longest = 48 if rig.is_real else 26
    runner = make_runner(rig.device)
    tokens, queue = set(), DeviceSteps.draft
    with monkeypatch.context() as patch:
        patch.setattr(
            DeviceSteps,
            "draft",
            lambda *one: tokens.add(one[1].hidden_states.shape[0]) or queue(*one),
        )
        warm_up_kernels(runner)
    # its kernels have other forms for other numbers of tokens, as those of any layer
    assert tokens == {1, 2, 3, 4, 7, 8, 12}
    capture_graphs(runner, (2, 6), capture_of(rig))
    costs = measure.measure_step_costs(
        lambda decoder: make_engine(runner, decoder, longest), DeviceMtpDrafter(runner), MOST
    )
    assert (runner.input_batch.block_tables == -1).all()
    assert costs is not None
    one, *more = costs.of(2, 2)
    assert 0 < one <= min(more)
    runner.graphs = None
    gc.collect()
