"""Speculative decoding changes no token, text, score or reason, whatever the drafts."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fd_dsa.engine.batch import Drafts
from fd_dsa.engine.draft_state import DraftCosts, DraftState
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.prompt_lookup import LookupIndex, PromptLookup
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import ArbitraryDrafter, Drafter, SpecDecoder
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.startup.measure import measure_step_costs
from tests.engine.byte_model import TOKENIZER, VOCAB_SIZE, make_engine
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import run_all

OPEN = TOKENIZER.encode("<", add_special_tokens=False)[0]
THINK_END = TOKENIZER.encode("</think>", add_special_tokens=False)[0]
JSON = StructuredOutputsParams(json={"type": "array", "items": {"enum": ["a", 12, True]}})
# letters are likelier, so that stop strings and bad words come
LETTERS = {TOKENIZER.encode(letter, add_special_tokens=False)[0]: 4.0 for letter in "abcde"}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 37},
    {"temperature": 1, "top_p": 0.8, "top_k": 40, "logprobs": 3},
    {"temperature": 0.5, "min_p": 0.1, "n": 3, "logprobs": 0},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": -0.5},
    {"logit_bias": LETTERS, "stop": ["ab", "dca"], "logprobs": 2},
    {"logit_bias": LETTERS, "stop": "ee", "min_tokens": 20, "include_stop_str_in_output": True},
    {"logit_bias": LETTERS, "bad_words": ["ab", "cde", "bb"], "bad_words_token_ids": [9]},
    {"stop_token_ids": list(range(200, 300)), "ignore_eos": True, "temperature": 1},
    {"stop_token_ids": list(range(100, 300)), "min_tokens": 11},
    {"structured_outputs": JSON, "logprobs": 1},
    {"structured_outputs": JSON, "reasoning": Reasoning("", "</think>"),
     "logit_bias": {THINK_END: 5.0}, "max_tokens": 60},
    # half of the outputs open a reasoning of their own
    {"structured_outputs": JSON, "reasoning": Reasoning("<", "</think>"), "n": 2,
     "logit_bias": {THINK_END: 5.0, OPEN: 4.0}, "max_tokens": 60, "stop": ["]]"]},
    {"prompt_logprobs": 2, "max_tokens": 9},
    {"speculative": False},
]  # fmt: skip


def run(spec_decoder: SpecDecoder | None) -> tuple[dict[tuple[str, int], list[RequestOutput]], Any]:
    """All steps of every output, in an engine so small that requests are preempted."""
    with pytest.MonkeyPatch.context() as patch:
        # on a busy machine masks may be late, and an output would end in a later step
        for module in ("grammar", "grammar_process"):
            patch.setattr(f"fd_dsa.engine.{module}._PATIENCE_S", 60.0)
        engine = make_engine(num_blocks=32, max_num_seqs=5, budget=13, spec_decoder=spec_decoder)
        for number, kind in enumerate(KINDS):
            prompt = [5, 6, 7, 8, 9, 5, 6, 7, 20 + number, 5, 6]
            params = SamplingParams(**{"max_tokens": 40, "seed": number, **kind})
            engine.add_request(str(number), prompt, params)
        found = run_all(engine)
    steps: dict[tuple[str, int], list[RequestOutput]] = {}
    for name, outputs in found.items():
        for output in outputs:
            steps.setdefault((name, output.index), []).append(output)
    return steps, engine.stats()


PLAIN, _ = run(None)
ANSWERS = {name: steps[-1].token_ids for name, steps in PLAIN.items()}


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize(
    "drafter",
    [
        lambda: PromptLookup(3, 1),
        lambda: KnowingDrafter(ANSWERS, 0.0, VOCAB_SIZE),
        lambda: KnowingDrafter(ANSWERS, 0.6, VOCAB_SIZE, seed=1, is_layer=True),
        lambda: KnowingDrafter(ANSWERS, 1.0, VOCAB_SIZE),
    ],
    ids=["lookup", "wrong", "often right", "right"],
)
def test_every_output_is_that_without_drafts(drafter: Callable[[], Drafter], most: int) -> None:
    steps, stats = run(SpecDecoder(drafter(), most))
    assert stats.num_preemptions and stats.num_draft_tokens
    assert steps.keys() == PLAIN.keys()
    for name, outputs in steps.items():
        last, plain = outputs[-1], PLAIN[name][-1]
        for field in ("token_ids", "text", "finish_reason", "stop_reason", "logprobs"):
            assert getattr(last, field) == getattr(plain, field), (name, field)
        assert last.prompt_logprobs == plain.prompt_logprobs
        # what the steps add is the same, in larger pieces
        assert [token for output in outputs for token in output.new_token_ids] == plain.token_ids
        assert "".join(output.new_text for output in outputs) == plain.text
        scores = [score for output in outputs for score in output.new_logprobs]
        assert scores == (plain.logprobs or [])
        # split into tokens, they are the steps without drafts
        parts = [part for output in outputs for part in output.by_token() if part.new_token_ids]
        assert list(map(_additions, parts)) == list(map(_additions, PLAIN[name])), name
        if KINDS[int(name[0])].get("speculative") is False:
            assert last.num_draft_tokens == 0
    ends = [outputs[-1] for outputs in steps.values()]
    assert sum(end.num_draft_tokens for end in ends) == stats.num_draft_tokens
    assert sum(end.num_accepted_tokens for end in ends) == stats.num_accepted_tokens


def _additions(output: RequestOutput) -> tuple[Any, ...]:
    """Return what one step adds to an output."""
    added = output.new_token_ids, output.new_text, list(output.new_logprobs)
    return (*added, output.num_tokens, output.finish_reason)


def test_right_drafts_save_steps_and_are_counted() -> None:
    def steps_of(spec_decoder: SpecDecoder | None) -> Any:
        engine = make_engine(budget=64, spec_decoder=spec_decoder)
        params = SamplingParams(temperature=0, max_tokens=41, ignore_eos=True)
        engine.add_request("r", [5, 6, 7], params)
        outputs = run_all(engine)["r"]
        return engine.stats(), outputs

    before, outputs = steps_of(None)
    answers = {("r", 0): outputs[-1].token_ids}
    now, outputs = steps_of(SpecDecoder(KnowingDrafter(answers, 1.0, VOCAB_SIZE), 3))
    # one token of the prompt's step, then ten steps of four
    assert (before.num_steps, now.num_steps) == (41, 11)
    assert now.num_accepted_tokens == now.num_draft_tokens == 30
    assert (now.num_drafts, now.accepted_per_position) == (10, (10, 10, 10))
    assert [len(output.new_token_ids) for output in outputs] == [1] + [4] * 10


def test_drafts_that_a_grammar_refuses_are_not_computed() -> None:
    form = StructuredOutputsParams(regex="[a-c]{30}")
    engine = make_engine(
        spec_decoder=SpecDecoder(KnowingDrafter({("r", 0): [250] * 40}, 1.0, 300), 3)
    )
    engine.add_request("r", [5], SamplingParams(max_tokens=40, structured_outputs=form))
    assert len(run_all(engine)["r"][-1].text) == 30
    assert engine.stats().num_draft_tokens == 0


def test_the_longest_run_that_came_before_proposes_what_followed() -> None:
    tokens = [1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3]
    index = LookupIndex(tokens, 3, 1)
    assert index.following(3) == [4, 9, 2]
    tokens.append(7)
    # the last place of a run of the same length
    assert index.following(2) == [1, 2]
    tokens.append(8)
    assert index.following(3) == []
    assert LookupIndex([3, 3, 3], 2, 1).following(3) == [3]
    assert LookupIndex([3], 2, 1).following(3) == []


class CheckedLookup(PromptLookup):
    """Compares what it proposes with a search of all tokens that there are."""

    num_drafts = 0

    def propose(self, step: Any, counts: Any) -> dict[Any, Drafts]:
        proposals = super().propose(step, counts)
        for request, drafts in proposals.items():
            assert drafts.tokens == searched(request.token_ids, counts[request], (3, 2, 1))
            self.num_drafts += len(drafts)
        return proposals


def searched(tokens: list[int], count: int, lengths: Sequence[int]) -> list[int]:
    """Return the tokens after the last earlier run of the tokens that end the list."""
    for length in lengths:
        for stop in range(len(tokens) - 1, length - 1, -1):
            if tokens[stop - length : stop] == tokens[-length:]:
                return tokens[stop : stop + count]
    return []


def test_the_lookup_proposes_what_a_search_finds_whatever_happened_before() -> None:
    drafter = CheckedLookup(3, 1)
    _, stats = run(SpecDecoder(drafter, 3))
    assert stats.num_preemptions and drafter.num_drafts > 100


@pytest.mark.parametrize("seed", range(40))
def test_an_index_finds_what_a_search_finds_in_a_growing_list(seed: int) -> None:
    draw = random.Random(seed)
    shortest = draw.randint(1, 4)
    longest = shortest + draw.randint(0, 3)
    # the bytes of some of these tokens contain the bytes of others
    known = draw.choice([range(2), range(5), [0, 1, 256, 257, 65536, 2**24, 2**31 - 1]])
    tokens: list[int] = []
    index = LookupIndex(tokens, longest, shortest)
    for _ in range(60):
        tokens += draw.choices(known, k=draw.choice([1, 1, 2, 3, 9]))
        for count in (1, 4):
            found = index.following(count)
            assert found == searched(tokens, count, range(longest, shortest - 1, -1))


def test_a_garbage_collection_visits_no_tokens_of_an_index() -> None:
    def num_visited() -> int:
        return sum(len(gc.get_referents(one)) for one in gc.get_objects())

    tokens = random.Random(0).choices(range(150_000), k=8000)
    index = LookupIndex(tokens, 5, 2)
    gc.collect()
    before = num_visited()
    index.following(3)
    assert num_visited() < before + 1000


def test_nothing_is_looked_up_where_no_draft_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LookupIndex, "following", lambda *_: pytest.fail("looked up"))
    run(SpecDecoder(PromptLookup(3, 1), 3, DraftCosts({1: [1.0, 2.0, 3.0, 4.0]})))


def test_a_long_prompt_is_listed_over_several_steps() -> None:
    tokens = [*range(20_000), 5, 6, 7]
    index = LookupIndex(tokens, 3, 3)
    found = [index.following(2) for _ in range(3)]
    assert found == [[], [], [8, 9]]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("costs", [[1, 1.1, 1.2, 1.3], [1, 1.5, 1.9, 2.3], [1, 2.1, 3.2, 4.3]])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_the_number_of_drafts_is_nearly_the_best(
    rate: float, costs: list[float], is_ahead: bool
) -> None:
    """Also where it is chosen before the drafts of the step before are verified."""
    draw = random.Random(0)
    state, tokens, seconds = DraftState(3, 0.85), 0, 0.0
    seen: list[tuple[int, int]] = []
    for _ in range(4000):
        length = state.length(costs)
        num_accepted = [*(draw.random() < rate for _ in range(length)), False].index(False)
        seen.append((length, num_accepted))
        if len(seen) > is_ahead and (found := seen.pop(0))[0]:
            state.record(*found)
        tokens += 1 + num_accepted
        seconds += costs[length]
    fixed = [sum(rate**place for place in range(n + 1)) / costs[n] for n in range(4)]
    assert tokens / seconds > 0.93 * max(fixed)


def test_drafts_that_are_never_right_cost_little() -> None:
    """An answer of 96 tokens takes at most a twentieth longer, at the demo model's costs."""
    state, costs, seconds = DraftState(3, 0.85), [1, 1.45, 1.75, 2.0], 0.0
    for _ in range(96):
        if length := state.length(costs):
            state.record(length, 0)
        seconds += costs[length]
    assert seconds < 96 / 0.95


def test_a_draft_that_would_not_pay_if_it_stood_is_not_tried() -> None:
    """Further drafts that are launched kernel by kernel take several steps' time."""
    state, costs = DraftState(3, 0.85), [1, 1.3, 7.0, 13.0]
    for _ in range(1000):
        assert state.length(costs) == 1
        state.record(1, 1)


def test_a_request_that_gets_predictable_drafts_again() -> None:
    state, costs = DraftState(2, 0.85), [1, 1.1, 1.2]
    for _ in range(200):
        if length := state.length(costs):
            state.record(length, 0)
    for _ in range(600):
        if length := state.length(costs):
            state.record(length, length)
    assert state.length(costs) == 2


def test_costs_of_steps_between_measured_ones() -> None:
    costs = DraftCosts({1: [1.0, 1.3], 4: [1.3, 1.9], 16: [4.0, 7.9]})
    assert costs.of(1, 1) == pytest.approx([1.0, 1.3])
    assert costs.of(10, 10) == pytest.approx([2.65, 4.9])
    # past the last as much for each row as before it, or in proportion to one that is alone
    assert costs.of(32, 32) == pytest.approx([7.6, 15.9])
    assert DraftCosts({1: [1.0, 1.3]}).of(3, 3) == pytest.approx([3.0, 3.9])
    # 2 of 4 rows have drafts: as many tokens as 3 that all do
    assert costs.of(4, 2) == pytest.approx([1.3, 1.7])
    # what is more work took no less time
    assert DraftCosts({1: [1.0, 3.0, 2.0], 4: [1.5, 1.8, 4.0]}).of(1, 1) == [1.0, 1.8, 2.0]


class CountedLayer(KnowingDrafter):
    """Counts the steps that its layer runs after."""

    num_steps = 0

    def propose(self, step: Any, counts: Any) -> dict[Any, Drafts]:
        self.num_steps += 1
        return super().propose(step, counts)


@pytest.mark.parametrize(("seconds", "pays"), [(1.1, True), (4.0, False)])
def test_no_step_of_a_full_batch_runs_a_layer_whose_drafts_do_not_pay(
    seconds: float, pays: bool
) -> None:
    """Prompts take several steps."""
    costs = DraftCosts({1: [1.0, 1.1], 8: [1.0, seconds]})
    answers = {(str(n), 0): [9] * 12 for n in range(8)}
    drafter = CountedLayer(answers, 1.0, VOCAB_SIZE, is_layer=True)
    engine = make_engine(max_num_seqs=8, budget=24, spec_decoder=SpecDecoder(drafter, 1, costs))
    for number in range(8):
        engine.add_request(str(number), [5] * 9, SamplingParams(max_tokens=12, ignore_eos=True))
    run_all(engine)
    assert (drafter.num_steps > 8) == pays and (drafter.num_steps == 0) == (not pays)


class TimedDrafts(ArbitraryDrafter):
    """Take time for each request of a step, and half as much for each draft."""

    now = 0.0

    def propose(self, step: Any, counts: Any) -> dict[Any, Drafts]:
        num_drafts = sum(map(len, step.drafts.values()))
        self.now += 1e-3 + 1e-4 * len(step.sampling) + 5e-5 * num_drafts
        return super().propose(step, counts)


def test_steps_of_requests_are_measured_with_all_that_they_take() -> None:
    drafter, engines = TimedDrafts(), []

    def make(spec_decoder: SpecDecoder) -> LLMEngine:
        engine = make_engine(max_num_seqs=20, budget=64, spec_decoder=spec_decoder)
        engine.clock = lambda: drafter.now
        engines.append(engine)
        return engine

    costs = measure_step_costs(make, drafter, 2)
    (engine,) = engines
    assert costs is not None
    # more than 16 rows are not measured on a CPU
    for rows in (1, 4, 10, 16, 20):
        times = [1e-3 + 1e-4 * rows * (1 + count / 2) for count in range(3)]
        assert costs.of(rows, rows) == pytest.approx(times)
    assert not engine.has_unfinished_requests() and engine.stats().num_used_blocks == 0
