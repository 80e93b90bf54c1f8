"""Capture of short steps into graphs, before the first request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from fd_dsa.errors import FdDsaError
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.runner.step_graphs import (
    Capture,
    CaptureError,
    GraphEntry,
    GraphKey,
    StepGraphs,
    capture_failed,
)
from fd_dsa.startup.graph_sizes import MAX_PROMPTS, PROMPT_SIZES, powers_below
from fd_dsa.startup.trial_rows import TrialRow, clear_rows, fill_rows
from fd_dsa.tensor import StepArray

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner
    from fd_dsa.runner.step import Step

logger = logging.getLogger(__name__)


def capture_graphs(
    runner: ModelRunner,
    sizes: Sequence[int],
    make_capture: Callable[[object], Capture],
    prompt_sizes: Sequence[int] = PROMPT_SIZES,
) -> None:
    """Capture decode steps and steps of short prompts, which the runner replays from then on.

    If the first capture is refused, all steps stay eager, and a warning says why.

    Args:
        runner: its kernels are warm, see `warm_up_kernels`.
        sizes: numbers of tokens of decode steps, with padding; each at most the tokens of a step.
        make_capture: makes the capture for a place of Paddle, such as PaddleCapture.
        prompt_sizes: numbers of keys of steps of prompts. Sizes above the tokens of a step are left
            out.

    Raises:
        DeviceError: a capture failed half-way, and Paddle cannot continue. Has the cure.
    """
    import paddle

    from fd_dsa.device.allocation import paddle_place

    batch, index_topk = runner.input_batch, runner.model.config.index_topk
    prompts = [size for size in prompt_sizes if size <= batch.max_num_tokens]
    max_prompts = min(MAX_PROMPTS, batch.max_num_seqs)
    graphs = StepGraphs(sizes, index_topk, batch.max_row_len, prompts, max_prompts)
    try:
        with paddle.no_grad():
            _fill(graphs, runner, make_capture(paddle_place(runner.device)))
    except CaptureError as error:
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
        clear_rows(batch)
    runner.graphs = graphs


def _fill(graphs: StepGraphs, runner: ModelRunner, capture: Capture) -> None:
    """Capture all steps, each with one live row. The other rows and all drafts are padding.

    Steps of as many logits share the graph of the sampling.
    """
    steps, batch = graphs.steps(), runner.input_batch
    samples: dict[int, Callable[[], None]] = {}
    # a capture must not make a stream
    runner.attn_backends[0].warm_up(steps[-1].num_tokens, runner.caches)
    for key in steps:
        row = TrialRow(1, key.max_seqlen_k - 1, False)
        if key.num_prompts:
            row = TrialRow(key.num_tokens, 0, True)
        runner.stage(np.array([fill_rows(batch, [row])]), SamplingInputs())
        graphs[key] = _capture_step(runner, capture, key, samples)
    if runner.model.mtp is None:
        return
    device, step = runner.device_steps, runner.forward_meta
    assert device is not None and step is not None
    max_rows = min(graphs.sizes[-1], batch.max_num_seqs)
    # only powers of two, so that there are few graphs
    rows = {max_rows, *powers_below(max_rows)}
    lengths = {key.max_seqlen_k for key in steps if not key.num_prompts}
    counts = range(2, 1 + runner.max_drafts)
    for size in sorted(product(rows, lengths, counts), reverse=True):
        _, graphs.drafts[size] = capture(partial(device.draft_more, step, *size))


def _capture_step(
    runner: ModelRunner, capture: Capture, key: GraphKey, samples: dict[int, Callable[[], None]]
) -> GraphEntry:
    """Capture the graphs of a step, which sample only padding during the capture.

    Args:
        samples: captured graphs of the sampling, by number of rows of logits. A new one is added.
    """
    device, rows = runner.device_steps, min(key.num_sampled, runner.input_batch.max_num_seqs)
    assert device is not None

    def run() -> tuple[StepArray | None, StepArray | None]:
        step = runner.run_padded(key)
        return step.logits, step.hidden_states

    def newest() -> Step:
        assert runner.forward_meta is not None
        return runner.forward_meta

    (_, hidden), replay = capture(run)
    step = newest()
    if key.num_sampled not in samples:
        _, samples[key.num_sampled] = capture(lambda: device.sample(newest()))
    # never called without a layer that drafts
    draft = replay
    if hidden is not None:
        _, draft = capture(lambda: device.draft(newest(), rows))
    return GraphEntry(step, replay, samples[key.num_sampled], draft)
