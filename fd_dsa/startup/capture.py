"""Capture of steps into graphs, before the first request."""

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
from fd_dsa.startup.graph_sizes import powers_below, prompt_limits
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
    prompt_sizes: Sequence[int] = (),
) -> None:
    """Capture decode steps and steps with prompts, which the runner replays from then on.

    If a capture is refused, all steps stay eager, or all steps with prompts if it is one of those.
    A warning says why.

    Args:
        runner: its kernels are warm, see `warm_up_kernels`.
        sizes: numbers of tokens of decode steps, with padding; each at most the tokens of a step.
        make_capture: makes the capture for a place of Paddle, such as PaddleCapture.
        prompt_sizes: numbers of tokens of steps with prompts, each at most the tokens of a step.

    Raises:
        DeviceError: a capture failed half-way, and Paddle cannot continue. Has the cure.
    """
    import paddle

    from fd_dsa.device.allocation import paddle_place

    batch, max_dense_keys = runner.input_batch, runner.model.config.max_dense_keys
    device, max_keys = runner.device_steps, runner.attn_backends[0].max_gathered_keys
    assert device is not None, "steps on a CPU are not captured"
    limits = max_dense_keys, batch.max_num_seqs, device.buffer.num_rows, max_keys
    prompts = {size: prompt_limits(size, *limits) for size in prompt_sizes}
    graphs = StepGraphs(sizes, max_dense_keys, batch.max_row_len, prompts)
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
        if key.limits is not None and not graphs.prompts:
            continue
        row = TrialRow(1, key.max_seqlen_k - 1, False)
        if key.limits is not None:
            row = TrialRow(min(key.num_tokens, key.max_seqlen_k), 0, True)
        runner.stage(np.array([fill_rows(batch, [row])]), SamplingInputs())
        try:
            graphs[key] = _capture_step(runner, capture, key, samples)
        except CaptureError as error:
            if key.limits is None:
                raise
            graphs.drop_prompts()
            logger.warning("steps with prompts stay eager, they cannot be captured: %s", error)
    if runner.model.mtp is None:
        return
    device, step = runner.device_steps, runner.forward_meta
    assert device is not None and step is not None
    max_rows = min(graphs.sizes[-1], batch.max_num_seqs)
    # only powers of two, so that there are few graphs
    rows = {max_rows, *powers_below(max_rows)}
    lengths = {key.max_seqlen_k for key in steps}
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
