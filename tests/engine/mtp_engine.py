"""Engines over a tiny model with a layer for multi-token prediction, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fd_dsa.engine.batch import Drafts, ScheduledBatch
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.mtp_drafter import MtpDrafter
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.prompt_lookup import PromptLookup
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.runner import InputBatch, ModelRunner
from tests.engine.fakes import byte_tokenizer, run_all
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import tiny_model

MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS, EOS = 96, 8, 12, 1
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 0},
    {"temperature": 1, "n": 3, "top_k": 8},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 1},
    {"temperature": 0, "ignore_eos": True, "min_tokens": 5},
    {"prompt_logprobs": 1, "temperature": 0},
    {"temperature": 0, "stop": ["ab", "c"], "cache_salt": "s"},
    {"temperature": 0, "speculative": False},
]


def dear_layer(most: int) -> DraftCosts:
    """Requests whose first drafts are rejected leave with it, and others begin after them."""
    seconds = {1: [1.0, 1.1, 1.16, 1.22], 4: [1.14, 1.33, 1.48, 1.62]}
    return DraftCosts({rows: times[: most + 1] for rows, times in seconds.items()})


class WatchedDrafter(MtpDrafter):
    """Remembers the drafts after each position of each output."""

    def __init__(self, runner: Any, most: int) -> None:
        super().__init__(runner)
        self._most = most
        self.proposed: dict[Request, dict[int, list[int]]] = {}
        self.num_runs = 0

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        # as many as there may be, whatever the rate at which they stand
        self.num_runs += 1
        proposals = super().propose(batch, dict.fromkeys(counts, self._most))
        for request, drafts in proposals.items():
            if drafts:
                self.proposed.setdefault(request, {})[len(request.token_ids)] = drafts.tokens
        return proposals


def make_runner(model: Any, num_blocks: int, kind: Any = ModelRunner) -> Any:
    """A runner with poisoned caches."""
    batch = InputBatch(4, 24, MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
    layout = model.config.cache_layout("float32", BLOCK_SIZE)
    runner = dsa_runner(model, batch, layout, num_blocks, kind=kind)
    for cache in runner.caches:
        if cache is not None:
            np.from_dlpack(cache)[...] = np.nan
    return runner


def make_model(fields: dict[str, Any]) -> Any:
    """A tiny model with its layer."""
    return tiny_model(fields | {"num_nextn_predict_layers": 1}, seed=2, mtp=())


def make_engine(
    runner: ModelRunner, spec_decoder: SpecDecoder | None, num_blocks: int
) -> LLMEngine:
    """The engine of that runner."""
    return LLMEngine(
        runner,
        byte_tokenizer(),
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
        spec_decoder=spec_decoder,
    )


def answers(
    model: Any, method: str | None, most: int = 3, costs: DraftCosts | None = None
) -> tuple[dict[tuple[str, int], RequestOutput], LLMEngine, Any]:
    """The last state of every output, with an engine so small that requests are preempted."""
    return answers_of(make_runner(model, NUM_BLOCKS), method, most, costs)


def answers_of(
    runner: ModelRunner, method: str | None, most: int = 3, costs: DraftCosts | None = None
) -> tuple[dict[tuple[str, int], RequestOutput], LLMEngine, Any]:
    """Return the results of `answers` for a runner that has run no step."""
    drafter: Any = PromptLookup(3, 1) if method == "ngram" else WatchedDrafter(runner, most)
    engine = make_engine(runner, SpecDecoder(drafter, most, costs) if method else None, NUM_BLOCKS)
    draw = np.random.default_rng(0)
    stem = draw.integers(2, 40, 30).tolist()
    for number in range(len(KINDS)):
        prompt = stem[: draw.integers(5, 30)] + draw.integers(2, 40, 4).tolist()
        kind = {"max_tokens": 34, "seed": number, **KINDS[number]}
        engine.add_request(str(number), prompt, SamplingParams(**kind))
    ends = {}
    for outputs in run_all(engine).values():
        ends.update({(o.request_id, o.index): o for o in outputs if o.finished})
    return ends, engine, drafter


def shown(output: RequestOutput) -> tuple[Any, ...]:
    """All that a caller sees of an output."""
    return (
        output.token_ids,
        output.text,
        output.finish_reason,
        output.stop_reason,
        output.logprobs,
        output.prompt_logprobs,
    )
