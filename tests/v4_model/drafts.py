"""Engines over tiny DeepSeek-V4 models with a layer for multi-token prediction, and a drafter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.engine.batch import Drafts, ScheduledBatch
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.mtp_drafter import MtpDrafter
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.v4_attention import V4AttentionBackend
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import byte_tokenizer, run_all
from tests.v4_model.cases import CASES, Case
from tests.v4_model.ours import poison

MOST, EOS = 3, 1
MTP = {"num_nextn_predict_layers": 1}
MIXED = Case("mixed", MTP, seed=1)
RELEASED = Case("released", CASES["released-ratios"].changes | MTP, seed=12)
Answers = dict[tuple[str, int], RequestOutput]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 0},
    {"temperature": 1, "n": 3, "top_k": 8},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 1},
    {"temperature": 0, "n": 2, "min_tokens": 5},
    {"prompt_logprobs": 1, "temperature": 0},
    {"temperature": 0, "speculative": False},
]


@dataclass(frozen=True)
class Load:
    """Requests of one model, in an engine so small that some are preempted.

    Attributes:
        lengths: of the prompts, which begin alike.
        max_model_len: of an engine, tokens.
        budget: tokens of a step.
    """

    case: Case
    lengths: tuple[int, ...]
    num_new: int
    max_model_len: int
    num_blocks: int
    budget: int = 24

    def runner(self, model: Any, most: int, num_blocks: int | None = None) -> ModelRunner:
        """A runner with poisoned caches."""
        size, count = self.case.block_size, num_blocks or self.num_blocks
        batch = InputBatch(4, self.budget + 4, self.max_model_len // size, size)
        backend = V4AttentionBackend(model.config, batch, count, most)
        runner = ModelRunner(model, batch, backend)
        poison(runner)
        return runner

    def engine(self, runner: ModelRunner, spec_decoder: SpecDecoder | None) -> LLMEngine:
        """The engine of that runner, with a request of each kind."""
        engine = LLMEngine(
            runner,
            byte_tokenizer(self.case.config["vocab_size"]),
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            eos_token_ids=[EOS],
            spec_decoder=spec_decoder,
        )
        stem = self.case.prompt(max(self.lengths))
        for number, (kind, length) in enumerate(zip(KINDS, self.lengths, strict=True)):
            prompt = [*stem[: length - 2], 3 + number, 4]
            params = {"max_tokens": self.num_new, "seed": number, "ignore_eos": True, **kind}
            engine.add_request(str(number), prompt, SamplingParams(**params))
        return engine

    def answers(
        self, model: Any, drafter_of: Callable[[ModelRunner], Any] | None, most: int = MOST
    ) -> tuple[Answers, LLMEngine, Any]:
        """The last state of every output, the engine and its drafter."""
        runner = self.runner(model, most)
        drafter = drafter_of(runner) if drafter_of else None
        engine = self.engine(runner, SpecDecoder(drafter, most) if drafter else None)
        ends = {}
        for outputs in run_all(engine).values():
            ends.update({(o.request_id, o.index): o for o in outputs if o.finished})
        return ends, engine, drafter


# windows of 8, entries of 4 and 16, blocks of 16; and windows, entries and blocks of 128
LOADS = {
    "mixed": Load(MIXED, (9, 15, 30, 31, 33, 48, 20), 34, 96, 9),
    "released": Load(RELEASED, (120, 126, 240, 250, 127, 128, 129), 22, 384, 4, 80),
}


class DoubleDrafter(MtpDrafter):
    """Runs the layer as any request needs it, and may propose tokens of a test double instead.

    Attributes:
        proposed: what the layer drafts after each length of each request.
        accepted: numbers of drafts that a step has accepted.
    """

    def __init__(self, runner: Any, most: int, double: KnowingDrafter | None) -> None:
        super().__init__(runner)
        self._most, self._double = most, double
        self.proposed: dict[Request, dict[int, list[int]]] = {}
        self.accepted: set[int] = set()
        self._lengths: dict[Request, int] = {}

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        # as many as there may be, whatever the rate at which they stand
        counts = dict.fromkeys(counts, self._most)
        proposals = super().propose(batch, counts)
        for request, drafts in proposals.items():
            length = len(request.token_ids)
            if request in batch.drafts and request in self._lengths:
                self.accepted.add(length - self._lengths[request] - 1)
            self._lengths[request] = length
            self.proposed.setdefault(request, {})[length] = drafts.tokens
        return proposals if self._double is None else self._double.propose(batch, counts)


def double_of(answers: Answers, share: float, most: int, seed: int = 0) -> Any:
    """Maker of a drafter that is right in a share of the cases."""
    tokens = {name: output.token_ids for name, output in answers.items()}
    return lambda runner: DoubleDrafter(runner, most, KnowingDrafter(tokens, share, 40, seed))


def offline(load: Load, model: Any, ids: list[int], count: int) -> list[int]:
    """The layer's drafts after some tokens, greedy, by a runner that computes these alone."""
    columns = load.max_model_len // load.case.block_size
    runner, drafts = load.runner(model, MOST, columns), list[int]()
    batch = runner.input_batch
    batch.set_blocks(0, range(columns))
    logits = np.empty(0)
    for begin in range(0, len(ids) - 1, load.budget):
        chunk = ids[begin : begin + load.budget][: len(ids) - 1 - begin]
        batch.begin_step()
        batch.add_row(0, chunk, begin, is_prefill=True)
        runner.execute_model(np.array([0]))
        next_ids = np.array(ids[begin + 1 : begin + 1 + len(chunk)])
        logits = runner.predict_more(next_ids, [len(chunk) - 1])
    while True:
        drafts.append(int(logits[0].argmax()))
        if len(drafts) == count:
            return drafts
        batch.begin_step()
        batch.add_row(0, drafts[-1:], len(ids) + len(drafts) - 2, is_prefill=False)
        logits = runner.predict_more(np.array(drafts[-1:]), [0], [0])
