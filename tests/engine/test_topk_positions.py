"""The positions of the indexer's choice that a request gets, against an oracle's scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa import SamplingParams
from fd_dsa.accuracy.selection.topk_hook import RecordingBackend, read_index_keys
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.output import RequestOutput
from fd_dsa.runner import InputBatch
from tests.engine.fakes import byte_tokenizer, make_engine, run_all
from tests.reference.indexer import ref_score
from tests.reference.topk import ref_topk
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import GLM, V32, tiny_model

ASKING = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, return_topk_positions=True)
TOPK, BLOCK_SIZE = V32["index_topk"], 4
LEAST_LEAD = 1e-4


def tiny_engine(fields: dict[str, Any]) -> LLMEngine:
    """An engine over a random model; prompts are read in chunks of 24, a block holds 4 tokens."""
    model = tiny_model(fields)
    batch = InputBatch(4, 24, 24, BLOCK_SIZE)
    layout = model.config.cache_layout("float32", BLOCK_SIZE)
    return LLMEngine(
        dsa_runner(model, batch, layout, 60),
        byte_tokenizer(model.config.vocab_size),
        num_blocks=60,
        max_model_len=96,
        eos_token_ids=[],
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(2, 50, length).tolist()


def last_of(outputs: list[RequestOutput]) -> RequestOutput:
    """The last state, which alone has what was chosen."""
    assert [output.topk_positions for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    return outputs[-1]


def chosen(output: RequestOutput) -> list[list[int]]:
    """Positions by layer."""
    assert output.topk_positions is not None
    return [layer.tolist() for layer in output.topk_positions.layers]


def oracle(fields: dict[str, Any], tokens: list[int]) -> list[list[int]]:
    """Choices of every layer for the last of these tokens: all are scored by plain loops.

    The tokens run as one prompt in a batch of their own. Index queries, weights and keys are
    those that the layers hand to their backend and leave in the caches; scores and choice are of
    `tests/reference`.
    """
    model = tiny_model(fields)
    batch = InputBatch(1, 96, 24, BLOCK_SIZE)
    layout = model.config.cache_layout("float32", BLOCK_SIZE)
    runner = dsa_runner(model, batch, layout, 24)
    recording = RecordingBackend(runner.attn_backends[0].config)
    runner.attn_backends[0] = recording
    position = len(tokens) - 1
    recording.watch([position])
    batch.set_blocks(0, range(24))
    runner.execute_model(np.array([batch.add_row(0, tokens, 0, True)]))
    found: list[list[int]] = []
    for layer in range(model.config.num_hidden_layers):
        trace = recording.layers[layer]
        if not trace.index_queries:
            found.append(found[-1])
            continue
        keys = read_index_keys(runner.caches[2 * layer + 1], np.arange(len(tokens)), layout)
        query, weights = trace.index_queries[position], trace.index_weights[position]
        scores = np.array([ref_score(query, weights, key) for key in keys], np.float32)
        found.append(ref_choice(scores))
    return found


def ref_choice(scores: np.ndarray) -> list[int]:
    """The best positions, ascending; they lead by more than rounding could take."""
    best = ref_topk(scores, len(scores), min(TOPK, len(scores)))
    others = np.delete(scores, best)
    assert not len(others) or scores[best].min() - others.max() > LEAST_LEAD
    return best


@pytest.mark.parametrize("fields", [V32, GLM], ids=["v32", "glm"])
def test_positions_are_those_of_the_oracle(fields: dict[str, Any]) -> None:
    """Three requests of other lengths in one batch, one of which shares a prefix with another."""
    engine = tiny_engine(fields)
    prompts = {"short": prompt(3), "long": prompt(40), "like": [*prompt(40)[:30], 7, 8]}
    for name, tokens in prompts.items():
        engine.add_request(name, tokens, ASKING)
    outputs = run_all(engine)
    for name, tokens in prompts.items():
        output = last_of(outputs[name])
        # the last token is never fed back: what was chosen is of the one before
        fed = [*tokens, *output.token_ids[:-1]]
        assert output.topk_positions is not None
        assert output.topk_positions.position == len(fed) - 1
        found = chosen(output)
        assert len(found) == engine.runner.model.config.num_hidden_layers
        assert found == oracle(fields, fed)
        assert {len(layer) for layer in found} == {min(TOPK, len(fed))}


def test_hits_and_choices_are_told_the_same() -> None:
    engine = tiny_engine(V32)
    tokens = prompt(40)
    engine.add_request("first", tokens, ASKING)
    first = last_of(run_all(engine)["first"])
    engine.add_request("again", tokens, replace(ASKING, n=2))
    outputs = run_all(engine)["again"]
    ends = [output for output in outputs if output.finished]
    assert [end.index for end in ends] == [0, 1]
    assert ends[0].num_cached_tokens > 0
    assert chosen(ends[0]) == chosen(ends[1]) == chosen(first)


def test_tokens_do_not_depend_on_being_watched() -> None:
    silent = replace(ASKING, return_topk_positions=False)
    engine = tiny_engine(V32)
    for name, params in (("asks", ASKING), ("silent", silent)):
        engine.add_request(name, prompt(30), params)
    outputs = run_all(engine)
    assert outputs["asks"][-1].token_ids == outputs["silent"][-1].token_ids
    assert outputs["silent"][-1].topk_positions is None
    assert outputs["asks"][-1].topk_positions is not None


def test_nothing_is_kept_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(V32)

    def refuse(*_: Any) -> None:
        raise AssertionError("a step that nobody watches")

    monkeypatch.setattr(engine.runner, "execute_with_selections", refuse)
    monkeypatch.setattr("fd_dsa.runner.selections.Selections.add", refuse)
    engine.add_request("silent", prompt(30), replace(ASKING, return_topk_positions=False))
    assert run_all(engine)["silent"][-1].finish_reason == "length"


def test_a_runner_that_cannot_tell_refuses_by_name() -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=r"^return_topk_positions is true; .* --device cpu$"):
        engine.add_request("r", [5, 6], ASKING)
    with pytest.raises(ValueError, match="return_topk_positions: got 'yes'"):
        replace(ASKING, return_topk_positions="yes")
