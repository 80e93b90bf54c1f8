"""Worker: turns of a long conversation, alone and beside other streams."""

from __future__ import annotations

import time
from typing import Any

from benchmarks._harness import random_prompts
from benchmarks.workers import gpu_engine

STREAM_PROMPT = 64


class Engine(gpu_engine.Engine):
    """The engine, with turns whose prompts begin with a long context."""

    def turn(self, context: int, question: int, seed: int, number: int) -> dict[str, Any]:
        """Return seconds to the first token of a turn, and where its tokens were found.

        Args:
            context: tokens that all turns of a seed begin with.
            question: further tokens, different in each turn.
            number: number of the turn.
        """
        self._add_turn(context, question, seed, number)
        begin, output = time.perf_counter(), None
        while output is None:
            output = next(iter(self._engine.step()), None)
        return {"seconds": time.perf_counter() - begin, **_found(output)}

    def beside(
        self, streams: int, tokens: int, context: int, question: int, seed: int, number: int
    ) -> dict[str, Any]:
        """Return seconds in which each of `streams` gets `tokens`, while a turn comes.

        Args:
            context, question, seed, number: as for `turn`.
        """
        counts = dict.fromkeys(map(str, range(streams)), 0)
        prompts = random_prompts(streams, STREAM_PROMPT, self._vocab_size, seed=999)
        for name, prompt in zip(counts, prompts, strict=True):
            self._engine.add_request(name, prompt, self._greedy(4 * tokens))
        while not all(counts.values()):
            self._count(counts)
        before = dict(counts)
        self._add_turn(context, question, seed, number)
        begin, turn = time.perf_counter(), None
        while turn is None or any(counts[name] - before[name] < tokens for name in counts):
            turn = self._count(counts) or turn
        seconds = time.perf_counter() - begin
        self._engine.abort_all()
        self._engine.step()
        return {"seconds": seconds, **_found(turn)}

    def _count(self, counts: dict[str, int]) -> Any:
        """Make a step and count the tokens of streams. Returns the output of the turn, or None."""
        turn = None
        for output in self._engine.step():
            if output.request_id in counts:
                counts[output.request_id] += len(output.new_token_ids)
            else:
                turn = output
        return turn

    def _add_turn(self, context: int, question: int, seed: int, number: int) -> None:
        """Queue a turn with one token as its answer."""
        (prompt,) = random_prompts(1, context, self._vocab_size, seed)
        (asked,) = random_prompts(1, question, self._vocab_size, seed=1000 * (seed + 1) + number)
        self._engine.add_request("turn", prompt + asked, self._greedy(1))

    @property
    def _vocab_size(self) -> int:
        return int(self._engine.runner.vocab_size)

    @staticmethod
    def _greedy(new_tokens: int) -> Any:
        # Paddle is imported after the device is open
        from fd_dsa import SamplingParams

        return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)


def _found(output: Any) -> dict[str, int]:
    """Return the prompt tokens that were found, and those of them found in host memory."""
    return {"cached": output.num_cached_tokens, "from_host": output.num_host_cached_tokens}
