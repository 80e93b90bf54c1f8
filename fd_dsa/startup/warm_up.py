"""Warm-up of a runner: kernels compiled and decode steps captured before the first request."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fd_dsa.environment import usable_cpus
from fd_dsa.errors import DeviceError, describe_error
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.runner.counters import StepCounters
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.startup.capture import capture_graphs
from fd_dsa.startup.host_memory import available_memory_bytes
from fd_dsa.startup.plan import EnginePlan
from fd_dsa.startup.trial_rows import clear_rows, fill_rows
from fd_dsa.startup.trial_steps import dense_steps, sparse_steps

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# processes that compile: more have nothing to do while the slowest kernel is compiled
_MAX_COMPILERS = 16
# host memory for each of them
_COMPILER_BYTES = 512 << 20


def share_activations(plan: EnginePlan) -> None:
    """Give steps of all sizes the same memory, by a block that is freed at once.

    Paddle keeps freed memory, and the activations of growing steps would add up.
    """
    if not runs_compiled(plan.device):
        return
    from fd_dsa.device.allocation import paddle_allocator

    paddle_allocator(plan.device)((plan.memory.activation_bytes,), "uint8")


def compile_in_processes(runner: ModelRunner, plan: EnginePlan) -> None:
    """Compile the kernels of a device in several processes, into Triton's cache on disk.

    The steps of `warm_up` run without their kernels, to find the forms. `warm_up` compiles
    whatever is missing afterwards, so no failure here is an error.
    """
    if not runs_compiled(plan.device):
        return
    from fd_dsa.triton_runtime import compile_ahead, warming

    start = time.perf_counter()
    try:
        fitting = available_memory_bytes() // _COMPILER_BYTES
        processes = min(usable_cpus(), fitting, _MAX_COMPILERS)
        if processes < 2:
            logger.info("kernels compile one at a time: no processor or memory for two processes")
            return
        with warming(), compile_ahead(processes) as ahead:
            compile_forms(runner)
            with runner.model.one_layer_of_each_kind():
                warm_up_kernels(runner, before_captures=not plan.config.enforce_eager)
            plan.caches.state_copies(runner.attn_backends[0])
    except Exception as error:
        logger.warning("kernels compile one at a time: %s", describe_error(error))
        clear_rows(runner.input_batch)
        return
    seconds, failed = time.perf_counter() - start, ""
    if ahead.errors:
        failed = f", {len(ahead.errors)} failed, first {ahead.errors[0]}"
    logger.info(
        "%d kernels in Triton's cache after %.1f s, by %d processes%s",
        *(ahead.num_kernels - len(ahead.errors), seconds, ahead.num_workers, failed),
    )


def warm_up(runner: ModelRunner, plan: EnginePlan) -> str:
    """Compile the kernels of a device and capture decode steps.

    From then on a step that compiles a kernel logs a warning. A CPU and Triton's interpreter have
    nothing to compile or capture.

    Returns:
        The work that was done, for the log.

    Raises:
        DeviceError: one of several ranks cannot capture, so that graphs of the others would hang.
    """
    if not runs_compiled(plan.device):
        return "not needed on this device"
    from fd_dsa.runner.step_graphs import PaddleCapture
    from fd_dsa.triton_runtime import freeze, warming

    start = time.perf_counter()
    # another engine of this process may have frozen the kernels
    with warming():
        compile_forms(runner)
        warm_up_kernels(runner, before_captures=not plan.config.enforce_eager)
        ready = time.perf_counter()
        if not plan.config.enforce_eager:
            sizes = plan.config.capture_sizes, plan.config.prompt_capture_sizes
            assert runner.device_steps is not None, "steps on a CPU are not captured"
            make_capture = partial(PaddleCapture, finish=runner.device_steps.finish)
            capture_graphs(runner, sizes[0], make_capture, sizes[1])
            graphs = runner.graphs
            captured = (graphs.sizes, tuple(graphs.prompts)) if graphs else None
            if captured != sizes and plan.config.tensor_parallel_size > 1:
                # the other ranks may have captured
                raise DeviceError("steps cannot be captured; start with --enforce-eager")
    freeze(on_late=runner.counters.count_late_compilation)
    done = f"kernels ready after {ready - start:.1f} s"
    if not (graphs := runner.graphs):
        return done
    steps = f"decode steps of {_listed(graphs.sizes)} rows"
    steps += ", further drafts" if graphs.drafts else ""
    if graphs.prompts:
        steps += f" and steps with prompts of {_listed(graphs.prompts)} tokens"
    seconds = time.perf_counter() - ready
    return f"{done}, {steps} captured in {seconds:.1f} s"


def _listed(sizes: Iterable[int]) -> str:
    """Return sizes as text."""
    return ", ".join(map(str, sizes))


def runs_compiled(device: str) -> bool:
    """Return True if a device runs compiled kernels."""
    return device != "cpu" and not interprets(device)


def interprets(device: str) -> bool:
    """Return True if kernels run in Triton's interpreter, whose times mean nothing."""
    if device == "cpu":
        return False
    from fd_dsa.triton_runtime import INTERPRETING

    return INTERPRETING


def compile_forms(runner: ModelRunner) -> None:
    """Compile all forms of the kernels, by steps of many sizes on one layer of each kind.

    The forms of a kernel depend on the tokens of a step and on the keys of its rows. Some also
    depend on the number of tokens that select their keys.
    """
    max_dense_keys = runner.model.config.max_dense_keys
    steps = dense_steps(runner.input_batch, max_dense_keys, runner.max_drafts)
    if runner.device_steps is not None:
        runner.set_parameters(0, RowParameters())
    with runner.model.one_layer_of_each_kind():
        for rows in steps:
            run_trial(runner, fill_rows(runner.input_batch, rows))
    clear_rows(runner.input_batch)


def warm_up_kernels(runner: ModelRunner, before_captures: bool = False) -> None:
    """Run steps of all kinds and magnitudes, so that no request waits for a compilation.

    All layers take part, in fewer steps than those of `compile_forms`. Results are dropped, and
    later steps write the caches again before they read them.

    Args:
        before_captures: True = steps fork to the second stream as captured steps do, which must not
            make its resources during a capture.
    """
    steps = sparse_steps(runner.input_batch, runner.model.config.max_dense_keys)
    device = runner.device_steps
    if device is not None:
        runner.set_parameters(0, RowParameters())
        device.warm_up()
    forks = runner.attn_backends[0].as_captured() if before_captures else nullcontext()
    with forks:
        for rows in steps:
            is_pending = device is not None and rows is steps[-1]
            last = fill_rows(runner.input_batch, rows, is_pending)
            if is_pending:
                runner.input_batch.pending_source[0] = 0
            run_trial(runner, last)
    clear_rows(runner.input_batch)
    # warm-up steps do not count
    runner.counters = StepCounters()


def run_trial(runner: ModelRunner, last: int) -> None:
    """Run the step in the batch, and wait for its sample and its drafts.

    Args:
        last: flat index of its last token, which is sampled.
    """
    sampled = np.array([last])
    if runner.device_steps is None:
        runner.execute_model(sampled)
        return
    # all kernels of the sampler run for any parameters
    runner.enqueue_model(sampled, SamplingInputs([0], [0], [0, 1]))
    runner.sample().result()
    if runner.model.mtp is not None:
        runner.draft(1, runner.max_drafts)
        runner.read_drafts().result()
