"""How many steps of requests ours has prepared in this process, for FastDeploy's log."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class StepCounts:
    """Counts steps, and logs the first, the tenth, the hundredth and so on.

    A worker has no other way to show its counters: FastDeploy ends it without a word.
    """

    def __init__(self) -> None:
        self.num_steps = self.num_prefill_steps = self.num_tokens = 0
        self._next_line = 1

    def count(self, num_tokens: int, has_prefill: bool) -> None:
        """A step of requests was prepared.

        Args:
            num_tokens: launched tokens.
            has_prefill: whether a prefill row may be in it.
        """
        self.num_steps += 1
        self.num_prefill_steps += has_prefill
        self.num_tokens += num_tokens
        if self.num_steps == self._next_line:
            self._next_line *= 10
            logger.info(
                "fd_dsa: steps prepared: %d, with prompts: %d, tokens: %d",
                self.num_steps,
                self.num_prefill_steps,
                self.num_tokens,
            )
