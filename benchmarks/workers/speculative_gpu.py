"""Worker: the engine on a GPU with one draft a row in every decode step, a known token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks._harness import random_prompts
from benchmarks.workers import gpu_engine

# steps after the first full one that make views and the like
DROPPED = 4


class KnownDrafts:
    """A drafter that knows the answers, and runs another drafter for its cost.

    Args:
        drafter: the drafter whose drafts are dropped, or None.

    Attributes:
        answers: tokens of each request. Without them there are no drafts.
    """

    # it knows which of its drafts stand, so how long an output is whose tokens are on their way
    is_layer, prior_acceptance_rate = True, 0.85

    def __init__(self, drafter: Any) -> None:
        self._drafter = drafter
        self.answers: dict[str, list[int]] = {}
        # place in the output of the draft on its way
        self._places: dict[Any, int] = {}

    def propose(self, step: Any, counts: Mapping[Any, int]) -> dict[Any, Any]:
        """Propose one token for each request."""
        from fd_dsa.engine.batch import Drafts

        if self._drafter is not None:
            self._drafter.propose(step, counts)
        proposals = {}
        for request in counts:
            answer = self.answers.get(request.state.request_id, [])
            place = len(request.output_token_ids)
            if request.pending_row >= 0:
                place += 1 + (self._places.get(request) == place)
            self._places[request] = place
            proposals[request] = answer[place:][:1]
        return {request: Drafts(tokens) for request, tokens in proposals.items()}


class Engine(gpu_engine.Engine):
    """The engine of `gpu_engine`, which knows its drafts if it has a speculative_config."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._known: KnownDrafts | None = None
        spec_decoder = self._engine.spec_decoder
        if spec_decoder is not None:
            from fd_dsa.engine.draft_state import DraftState

            # whatever drafts cost, everybody has one in every step
            DraftState.length = lambda *_: 1  # type: ignore[method-assign]
            has_layer = self._engine.runner.model.mtp is not None
            layer = spec_decoder.drafter if has_layer else None
            self._known = spec_decoder.drafter = KnownDrafts(layer)

    def drafted(self, batch: int, prompt: int, steps: int) -> dict[str, float]:
        """Return milliseconds of a step in which all requests decode, and the accepted share."""
        self._num_runs += 1
        vocab_size = self._engine.runner.vocab_size
        prompts = random_prompts(batch, prompt, vocab_size, self._num_runs)
        # steps in which others still read their prompts
        new = 2 * (steps + DROPPED) + 4 * (-(-batch * prompt // self._chunk) + 4)
        if self._known is not None:
            self._known.answers = {}
            self._known.answers = self._run(prompts, new)[0]
        _, times, accepted = self._run(prompts, new)
        return {"step_ms": float(np.median(times[DROPPED:][:steps])), "accepted": accepted}

    def profile(self, batch: int, prompt: int, steps: int) -> dict[str, Any]:
        """Profile decode steps in which each row has a wrong draft."""
        if self._known is not None:
            ids = (f"{self._num_runs + 1}-{index}" for index in range(batch))
            self._known.answers = dict.fromkeys(ids, [1] * 2 * prompt)
        return super().profile(batch, prompt, steps)

    def _run(
        self, prompts: list[list[int]], new: int
    ) -> tuple[dict[str, list[int]], list[float], float]:
        """Run prompts and time the steps in which all of them decode.

        Returns:
            Tokens of each request, milliseconds of these steps, and accepted drafts per draft.
        """
        from fd_dsa import SamplingParams

        engine, is_known = self._engine, bool(self._known is not None and self._known.answers)
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        for index, ids in enumerate(prompts):
            engine.add_request(str(index), ids, params)
        tokens: dict[str, list[int]] = {}
        times: list[float] = []
        before, stats = time.perf_counter(), engine.stats()
        drafts = accepted = 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now, last = time.perf_counter(), stats
            stats = engine.stats()
            tokens |= {output.request_id: output.token_ids for output in outputs}
            num_drafts = stats.num_draft_tokens - last.num_draft_tokens
            if len(outputs) == len(prompts) and num_drafts == is_known * len(prompts):
                times.append(1e3 * (now - before))
                drafts += num_drafts
                accepted += stats.num_accepted_tokens - last.num_accepted_tokens
            before = now
        return tokens, times, accepted / drafts if drafts else 0.0
