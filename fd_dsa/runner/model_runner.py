"""ModelRunner: the runner of the engine, with its work before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product

import numpy as np
import paddle

from fd_dsa.errors import FdDsaError
from fd_dsa.ops.sampling.parameters import SlotParameters
from fd_dsa.runner.counters import StepCounters
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.runner.step_graphs import (
    MAX_PROMPTS,
    PROMPT_SIZES,
    Capture,
    CaptureRefused,
    GraphEntry,
    GraphKey,
    StepGraphs,
    capture_failed,
)
from fd_dsa.runner.step_runner import StepRunner
from fd_dsa.step import StepHints
from fd_dsa.tensor import StepArray as Array

logger = logging.getLogger(__name__)


class ModelRunner(StepRunner):
    """Runner that compiles kernels and captures short steps before its first request."""

    def warm_up(self, before_captures: bool = False) -> None:
        """Run steps of all kinds and magnitudes: no request waits for kernels.

        A kernel may have several forms for different numbers of tokens. The limits between them are
        powers of two, so steps at and just below each power use all forms.
        Results are dropped; what is written to the caches is written again before it is read.

        Args:
            before_captures: steps fork to the second stream as captured ones do, so that a capture
                finds all that the first work on that stream makes.
        """
        batch, config = self.input_batch, self.model.config
        longest = self._longest_row()
        chunk = min(batch.max_num_tokens, longest)
        # past the selection keys are scored and chosen, and prompts attend in another form
        cached = min(config.index_topk, longest - 1)
        chunks = _sizes_up_to(chunk)
        prompts = [[(n, done, True)] for done in (0, cached) for n in chunks if n <= longest - done]
        # several prompts together may have more tokens than a row
        most_tokens = min(batch.max_num_tokens, longest * batch.max_num_seqs)
        for n in [size for size in _sizes_up_to(most_tokens) if size > chunk]:
            prompts.append([(min(longest, n - begin), 0, True) for begin in range(0, n, longest)])
        # rows that decode beside a prompt, all of them within the selection
        most = min(batch.max_num_seqs, batch.max_num_tokens)
        mixed = [
            [(1, max(min(1 << i, cached) - 1, 0), False)] * min(1 << i, most - 1) + [(1, 0, True)]
            for i in range(max(most, cached).bit_length())
        ]
        # the second decode step goes on from the draw of the first
        decode = [[(1, max(cached - 1, 0), False)], [(1, cached, False)]]
        if self.draws is not None:
            self.set_slot(0, SlotParameters())
            self.draws.warm_up()
        forks = self.attn_backends[0].as_captured() if before_captures else nullcontext()
        with forks:
            self._run_all(prompts + mixed + decode, decode[-1])
        self._forget_rows()
        # these were no steps of requests
        self.counters = StepCounters()

    def _run_all(self, steps: list[list[tuple[int, int, bool]]], last_decode: object) -> None:
        """Run steps of a warm-up. `last_decode` depends on the sample of the step before it."""
        for rows in steps:
            follows = self.draws is not None and rows is last_decode
            last = np.array([self._only_rows(rows, is_pending=follows)])
            if self.draws is None:
                self.execute_model(last)
                continue
            if follows:
                self.input_batch.follows[0] = 0
            # all kernels of the sampler run for any parameters
            self.enqueue_model(last, SamplingInputs([0], [0], [0, 1]))
            self.sample().result()
            if self._mtp is not None:
                self.draft(1, self.most_drafts)

    def capture_graphs(
        self,
        sizes: Sequence[int],
        capture: Callable[[object], Capture],
        prompt_sizes: Sequence[int] = PROMPT_SIZES,
    ) -> None:
        """Capture decode steps of these padded numbers of tokens, and steps of prompts.

        If the first graph cannot be captured, all steps stay eager, with one warning.

        Args:
            sizes: each at most the tokens of a step.
            capture: gives what captures on a place, such as PaddleCapture.
            prompt_sizes: numbers of keys of steps of prompts, as of StepGraphs; what is longer
                than a step is left out.

        Raises:
            DeviceError: a capture failed half-way, and Paddle cannot go on; has the cure.
        """
        from fd_dsa.device.places import paddle_place

        batch, topk, longest = self.input_batch, self.model.config.index_topk, self._longest_row()
        prompts = [size for size in prompt_sizes if size <= batch.max_num_tokens]
        rows = min(MAX_PROMPTS, batch.max_num_seqs)
        graphs = StepGraphs(sizes, topk, longest, prompts, rows)
        try:
            with paddle.no_grad():
                self._fill(graphs, capture(paddle_place(self._device)))
        except CaptureRefused as error:
            logger.warning(
                "all steps stay eager, they cannot be captured: %s; with --enforce-eager "
                "nothing is captured",
                error,
            )
            return
        except FdDsaError:
            raise
        except Exception as error:
            raise capture_failed(error) from error
        finally:
            self._forget_rows()
        self.graphs = graphs

    def _fill(self, graphs: StepGraphs, capture: Capture) -> None:
        """Capture all steps with one live row, and the steps of drafts with padding only."""
        steps = graphs.steps()
        # a capture must not make a stream
        self.attn_backends[0].warm_up(steps[-1].num_tokens, self.caches)
        for key in steps:
            tokens = key.num_tokens if key.num_prompts else 1
            done = 0 if key.num_prompts else key.max_seqlen_k - 1
            last = self._only_rows([(tokens, done, key.num_prompts > 0)])
            self._stage(np.array([last]), SamplingInputs())
            graphs[key] = self._capture_step(capture, key)
        if self._mtp is None:
            return
        most = min(graphs.sizes[-1], self.input_batch.max_num_seqs)
        # powers of two, so that there are few
        rows = {most, *_powers_below(most)}
        lengths = {key.max_seqlen_k for key in steps if not key.num_prompts}
        counts = range(2, 1 + self.most_drafts)
        for size in sorted(product(rows, lengths, counts), reverse=True):
            work = partial(self._device_draws().queue_more_drafts, self._newest_step(), *size)
            _, graphs.drafts[size] = capture(work)

    def _capture_step(self, capture: Capture, key: GraphKey) -> GraphEntry:
        """Capture the graphs of a step, which sample only padding during the capture."""
        draws, rows = self._device_draws(), min(key.num_sampled, self.input_batch.max_num_seqs)
        (_, hidden), replay = capture(lambda: self._run_padded(key))
        step = self._newest_step()
        _, sample = capture(lambda: draws.queue(self._newest_step()))
        # without such a layer requests have no drafts from it
        draft = replay
        if hidden is not None:
            _, draft = capture(lambda: draws.queue_drafts(self._newest_step(), rows))
        return GraphEntry(step, replay, sample, draft)

    def _run_padded(self, key: GraphKey) -> tuple[Array | None, Array | None]:
        """Run the staged step with the sizes of a graph, for its logits and hidden states."""
        assert self._to_device is not None
        tokens, rows = key.num_tokens, self.input_batch.max_num_seqs
        inputs, sampling = self._to_device.views(tokens, rows, key.num_sampled)
        is_prompt = key.num_prompts > 0
        lengths = key.prompt_lengths(rows) if is_prompt else None
        hints = StepHints(tokens, is_prompt * tokens, key.max_seqlen_k, tokens)
        step = self._begin(hints, inputs, sampling, lengths, has_pending=True)
        self._forward(step, reads_all=not is_prompt)
        return step.logits, step.hidden_states

    def _only_rows(self, rows: Sequence[tuple[int, int, bool]], is_pending: bool = False) -> int:
        """Fill the batch with rows that share their blocks, and return the index of the last token.

        Args:
            rows: of each its tokens, those before them, and whether they are of a prompt.
            is_pending: True if all tokens are the first sample of the step before.
        """
        batch = self.input_batch
        batch.begin_step()
        for row, (tokens, done, _) in enumerate(rows):
            batch.set_blocks(row, range(-(-(done + tokens) // batch.block_size)))
        counts, cached, are_prefills = zip(*rows, strict=True)
        ids = [0] * sum(counts)
        pending = dict.fromkeys(range(len(ids)), 0) if is_pending else {}
        batch.add_rows(range(len(rows)), counts, ids, cached, are_prefills, pending)
        return batch.num_tokens - 1

    def _forget_rows(self) -> None:
        """Remove all rows and blocks from the batch."""
        self.input_batch.begin_step()
        self.input_batch.block_tables[:] = -1


def _powers_below(limit: int) -> list[int]:
    """Return the powers of two below a limit."""
    return [1 << i for i in range((limit - 1).bit_length())]


def _sizes_up_to(limit: int) -> list[int]:
    """Return a limit, and the numbers at and just below each power of two below it, ascending."""
    powers = _powers_below(limit)
    return sorted({*powers, *(power - 1 for power in powers[1:]), limit})
