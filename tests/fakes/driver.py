"""Drives the double's worker as FastDeploy's engine would: requests in, greedy tokens out.

    with installed(TREES["develop"]):
        engine = Engine(folder, max_num_seqs=4)
        engine.generate([Job(prompt, max_tokens=8, chunk=64)])

The scheduler here does what a test asks of it: chunks, prefix hits, preemptions, late blocks and
drafts are properties of a job, not decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_SIZE = 64
# more steps than the chunks of any prompt
_PATIENCE = 200


@dataclass(eq=False)
class Job:
    """A request and how it is to be scheduled.

    Attributes:
        prompt: token ids.
        max_tokens: tokens to generate; no token ends a request early.
        chunk: most tokens of one prefill task.
        after: the job starts once this one has run its prompt, and takes the full blocks of their
            common prefix from it.
        start_at: first step that the job may be in.
        preempt_at: numbers of generated tokens at which it loses its blocks and starts again.
        late_blocks: steps that it waits, blocked, whenever it needs another block.
        drafts: proposes what follows all tokens so far; None = no drafts.
        fetch: fills the blocks that the job is given, for a prompt that another node has run;
            `output` then has that node's first token.
    """

    prompt: list[int]
    max_tokens: int
    chunk: int | None = None
    after: Job | None = None
    start_at: int = 0
    preempt_at: Sequence[int] = ()
    late_blocks: int = 0
    drafts: Callable[[list[int]], list[int]] | None = None
    fetch: Callable[[list[int]], None] | None = None
    output: list[int] = field(default_factory=list)
    # the engine's own record
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    target: int = 0
    seen: list[int] = field(default_factory=list)
    preempted: int = 0
    waited: int = 0

    @property
    def tokens(self) -> list[int]:
        """Prompt and what the engine knows to be generated."""
        return self.prompt + self.output


class Engine:
    """A worker with its model loaded and its caches made.

    Args:
        folder: checkpoint in Hugging Face format.
        num_gpu_blocks: blocks of the real caches; the profile run has fewer.
        overrides: fields of FDConfig.

    Attributes:
        worker, runner: FastDeploy's.
        num_steps: calls of `execute_model` so far.
    """

    def __init__(self, folder: Path, num_gpu_blocks: int = 64, **overrides: Any) -> None:
        from fastdeploy.config import fd_config
        from fastdeploy.worker.gpu_worker import GpuWorker

        sizes = {"max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 1024}
        self.config = fd_config(folder, **{**sizes, **overrides})
        self.worker = GpuWorker(self.config)
        self.worker.init_device()
        self.worker.load_model()
        self.worker.determine_available_memory()
        self.worker.initialize_cache(num_gpu_blocks)
        self.worker.graph_optimize_and_warm_up_model()
        self.runner = self.worker.model_runner
        if self.runner.speculative_decoding:
            self.runner.proposer.propose = self._propose
        self.num_steps = 0
        # physical blocks in no order, so that no test passes by luck
        shuffled = np.random.default_rng(0).permutation(num_gpu_blocks)
        self._free: list[int] = shuffled.tolist()
        self._owners = [0] * num_gpu_blocks
        self.rows: list[Job | None] = [None] * self.config.scheduler_config.max_num_seqs
        # the rows of the step before, whose output an overlapped step reports
        self._ran = list(self.rows)

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Greedy tokens of each job.

        Raises:
            RuntimeError: no token came in many steps, so none will.
        """
        waiting = list(jobs)
        made, idle = 0, 0
        while waiting or any(self.rows):
            self.step(waiting)
            idle = 0 if made < sum(len(job.output) for job in jobs) else idle + 1
            made = sum(len(job.output) for job in jobs)
            if idle > _PATIENCE:
                raise RuntimeError(f"no token in {idle} steps; {len(waiting)} jobs wait")
        return [job.output for job in jobs]

    def step(self, waiting: list[Job]) -> None:
        """One call of the worker; jobs that it admits leave `waiting`."""
        tasks = self._preemptions(waiting)
        self._admit(waiting)
        tokens_left = self.config.scheduler_config.max_num_batched_tokens
        for job in filter(None, self.rows):
            if job.done >= job.target:
                tokens_left -= 1 + self.runner.num_draft_tokens
        for job in filter(None, self.rows):
            done = job.done
            tasks += self._task(job, tokens_left)
            tokens_left -= job.done - done
        rows = [row for row, job in enumerate(self.rows) if job is not None]
        num_running = max([task.idx for task in tasks] + rows, default=-1) + 1
        self.worker.preprocess_new_task(tasks, num_running)
        saved, reported = len(self.runner.saved_output), self._ran
        self._ran = list(self.rows)
        if not self.config.scheduler_config.enable_overlap_schedule:
            reported = self._ran
        self.worker.execute_model(tasks, num_running)
        self.num_steps += 1
        for row, tokens in self.runner.saved_output[saved:]:
            self._take(reported[row], tokens)

    def _task(self, job: Job, tokens_left: int) -> list[Any]:
        """Return the scheduler's task for a row in this step, empty for one that waits or goes on.

        Args:
            tokens_left: that the step has for prompts.
        """
        from fastdeploy.engine.request import Request, RequestType

        if job.done < job.target:
            start = job.done
            job.done = min(job.target, start + min(job.chunk or job.target, tokens_left))
            if job.done == start:
                return []
            self._own(job, job.done)
            if job.fetch and not start:
                start, job.done = len(job.prompt), job.target
                job.fetch(job.blocks)
            kind = RequestType.PREFILL
            bounds = {"prefill_start_index": start, "prefill_end_index": job.done}
        else:
            # one position for the next token, and room for drafts and a step not yet reported
            drafts = self.runner.num_draft_tokens
            ahead = 1 if job.late_blocks else 2 + 2 * drafts
            needed = min(len(job.tokens) + ahead, self.config.model_config.max_model_len)
            if needed <= BLOCK_SIZE * len(job.blocks):
                return []
            if job.waited < job.late_blocks:
                job.waited += 1
                return []
            job.waited = 0
            self._own(job, needed)
            kind, bounds = RequestType.DECODE, {}
        request = Request(
            idx=job.row,
            task_type=kind,
            prompt_token_ids=job.prompt,
            output_token_ids=list(job.output),
            block_tables=list(job.blocks),
            max_tokens=job.max_tokens,
            disaggregate_decode=job.fetch is not None and not job.preempted,
            **bounds,
        )
        return [request]

    def _admit(self, waiting: list[Job]) -> None:
        """Give free rows to the jobs that may start."""
        for job in list(waiting):
            source = job.after
            ready = source is None or 0 < source.target <= source.done
            if None not in self.rows or self.num_steps < job.start_at or not ready:
                continue
            waiting.remove(job)
            job.row = self.rows.index(None)
            self.rows[job.row] = job
            job.target, job.done, job.seen = len(job.tokens), 0, list(job.output)
            if source is not None and not job.preempted:
                self._share(job, source)

    def _share(self, job: Job, source: Job) -> None:
        """The full blocks of the common prefix, short of the prompt's last token."""
        same = 0
        while same < min(len(job.prompt) - 1, len(source.prompt)):
            if job.prompt[same] != source.prompt[same]:
                break
            same += 1
        job.blocks = source.blocks[: same // BLOCK_SIZE]
        for block in job.blocks:
            self._owners[block] += 1
        job.done = len(job.blocks) * BLOCK_SIZE

    def _preemptions(self, waiting: list[Job]) -> list[Any]:
        """Tasks for the rows that lose their blocks; their jobs wait again, first in line."""
        from fastdeploy.engine.request import Request, RequestType

        tasks = []
        for job in filter(None, self.rows):
            due = [count for count in job.preempt_at if count <= len(job.output)]
            if len(due) > job.preempted:
                job.preempted += 1
                tasks.append(Request(job.row, RequestType.PREEMPTED))
                self._release(job)
                job.start_at = self.num_steps + 1
                waiting.insert(0, job)
        return tasks

    def _take(self, job: Job, tokens: list[int]) -> None:
        """Output of a row has come."""
        job.output += tokens
        if len(job.output) >= job.max_tokens and job.row >= 0:
            self._release(job)

    def _own(self, job: Job, num_tokens: int) -> None:
        """Blocks for so many tokens."""
        while len(job.blocks) * BLOCK_SIZE < num_tokens:
            block = self._free.pop(0)
            self._owners[block] = 1
            job.blocks.append(block)

    def _release(self, job: Job) -> None:
        """The row is free; so are blocks that nobody else has."""
        for block in job.blocks:
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
        self.rows[job.row] = None
        job.blocks, job.row = [], -1

    def _propose(self, row: int, accepted: list[int]) -> list[int]:
        """Drafts after what the device has accepted, which the engine may not know yet."""
        job = self.rows[row]
        job.seen += accepted
        return job.drafts(job.prompt + job.seen) if job.drafts else []
