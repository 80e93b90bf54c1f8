"""One line of the log for each output that has ended: counts and times, never texts."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput
    from fd_dsa.serve.generation import Job

logger = logging.getLogger("fd_dsa.requests")


class RequestLog:
    """Watches the outputs of one HTTP request.

    Args:
        jobs: its prompts.
        enabled: False logs nothing.
    """

    def __init__(self, jobs: Sequence[Job], enabled: bool) -> None:
        self._jobs = jobs
        self._enabled = enabled
        self._began = time.monotonic()
        # by number of the job and of its output
        self._last: dict[tuple[int, int], RequestOutput] = {}

    def note(self, index: int, output: RequestOutput) -> None:
        """Take note of an output of job `index`."""
        if not self._enabled:
            return
        self._last[index, output.index] = output
        if output.finished:
            self._write((index, output.index), str(output.finish_reason))

    def close(self) -> None:
        """The request is over: what has not ended by itself was aborted."""
        if not self._enabled:
            return
        for job_index, job in enumerate(self._jobs):
            for key in ((job_index, output_index) for output_index in range(job.params.n)):
                last = self._last.get(key)
                if last is None or not last.finished:
                    self._write(key, "abort")
        self._enabled = False

    def _write(self, key: tuple[int, int], finish_reason: str) -> None:
        """The line of one output."""
        job, last = self._jobs[key[0]], self._last.get(key)
        first = None if last is None else last.first_token_time
        fields = {
            "request_id": job.request_id,
            "index": key[1],
            "prompt_tokens": len(job.prompt_token_ids),
            "cached_tokens": 0 if last is None else last.num_cached_tokens,
            "completion_tokens": 0 if last is None else len(last.token_ids),
            "finish_reason": finish_reason,
            "first_token_s": None if first is None or last is None else first - last.arrival_time,
            "total_s": time.monotonic() - self._began,
        }
        shown = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        logger.info("%s", ", ".join(shown), extra={"fields": fields})
