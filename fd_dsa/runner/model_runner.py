"""Runner of a model on the rows of an InputBatch, on one device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import paddle

from fd_dsa.attention.protocol import AttentionBackend, HostLengths, PromptLimits
from fd_dsa.ops.arrays import as_numpy, rows_at
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.ops.sampling.token_buffer import TokenBuffer
from fd_dsa.runner.counters import StepCounters
from fd_dsa.runner.input_batch import NO_SAMPLING, InputBatch, SamplingInputs, StepInputs
from fd_dsa.runner.model_protocol import Model
from fd_dsa.runner.protocol import BlockStore, RunnerInfo, StateCopy, StepFuture
from fd_dsa.runner.selections import Selections
from fd_dsa.runner.step import Step
from fd_dsa.runner.step_graphs import GraphEntry, GraphKey, StepGraphs
from fd_dsa.step import StepHints
from fd_dsa.tensor import StepArray

if TYPE_CHECKING:
    from fd_dsa.runner.device_steps import DeviceSteps

_NO_INDICES = np.empty(0, np.int64)


class ModelRunner:
    """Runner of one model over one batch: a Step, its metadata, one forward, logits.

    Caches, metadata and slots belong to the attention backend, of which each family has its own.

    Args:
        model: model of `fd_dsa.models.registry` with its weights.
        input_batch: rows that the engine fills.
        backend: attention backend that fits the layers of the model.
        device: "cpu", "gpu:0" or a custom device of Paddle, which the model is on.
        max_drafts: maximum number of drafts of a row in a step on a device.

    Attributes:
        attn_backends: list of one backend, as DSAModelRunnerMixin expects.
        forward_meta: newest step, with its logits and hidden states; None before the first one.
        counters: counts of the steps that were run.
        graphs: captured steps; None if all steps are eager.
        block_store: host memory for prefix blocks; None without it.
        state_copy: copies the states that rows have in addition to blocks; None without any.
        device_steps: inputs and sampling on a device; None on a CPU.
        graph_key: sizes of the graph that the newest step replayed; None after an eager step.
    """

    def __init__(
        self,
        model: Model,
        input_batch: InputBatch,
        backend: AttentionBackend,
        device: str = "cpu",
        max_drafts: int = 0,
    ) -> None:
        self.model, self.input_batch, self.device = model, input_batch, device
        config = model.config
        self.vocab_size, self._max_dense_keys = config.vocab_size, config.max_dense_keys
        self.attn_backends: list[AttentionBackend] = [backend]
        self.caches = backend.allocate_caches(config.has_indexer)
        self.forward_meta: Step | None = None
        self.block_store: BlockStore | None = None
        self.state_copy: StateCopy | None = None
        self.counters = StepCounters()
        self.graphs: StepGraphs | None = None
        self.graph_key: GraphKey | None = None
        self.max_drafts = max_drafts
        # graphs of the newest step, None after an eager step, and its number of samples
        self._graph: GraphEntry | None = None
        self._num_samples = 0
        self._selections: Selections | None = None
        # layer for multi-token prediction
        self._mtp = model.mtp
        self.device_steps: DeviceSteps | None = None
        if device != "cpu":
            # kernels and their launcher are loaded only for a device
            from fd_dsa.device.allocation import paddle_allocator
            from fd_dsa.runner.device_steps import DeviceSteps

            allocate = paddle_allocator(device)
            self.device_steps = DeviceSteps(
                input_batch, self.vocab_size, allocate, max_drafts, self._mtp
            )

    def initialize_forward_meta(
        self, sampled: np.ndarray = _NO_INDICES, sampling: SamplingInputs = NO_SAMPLING
    ) -> Step:
        """Make the step of the rows in the batch with its metadata, and keep it in `forward_meta`.

        Args:
            sampled: int64 [n]; flat tokens whose logits are asked for.
            sampling: how a device samples a token from each of them.

        Raises:
            ValueError: inconsistent lengths or block tables, with row and value.
        """
        batch, steps = self.input_batch, self.device_steps
        padded = tokens = batch.num_tokens
        if steps is not None:
            on_host = self.stage(sampled, sampling)
            padded = self.attn_backends[0].padded_tokens(tokens)
            inputs, sampling = steps.inputs.views(padded, batch.num_rows, len(sampled))
        else:
            inputs = on_host = batch.arrays(sampled)
            sampling = NO_SAMPLING
            if self._mtp is not None:
                # the layer runs after rows that have ended have lost their blocks
                inputs = inputs._replace(block_tables=inputs.block_tables.copy())
        hints = StepHints(tokens, batch.num_prefill_tokens, batch.max_seqlen_k, padded)
        return self._begin(hints, inputs, sampling, on_host.lengths, has_pending=batch.has_pending)

    def stage(self, sampled: np.ndarray, sampling: SamplingInputs) -> StepInputs:
        """Enqueue the copy of the step in the batch to the device, and return its host arrays."""
        batch, steps = self.input_batch, self._on_device()
        next_ids: StepArray = ()
        if sampling.batch_rows and self._mtp is not None:
            next_ids = batch.next_tokens(sampled, steps.buffer.sample)
        inputs = batch.arrays(sampled)
        steps.inputs.stage(inputs, sampling, next_ids)
        return inputs

    def _begin(
        self,
        hints: StepHints,
        inputs: StepInputs,
        sampling: SamplingInputs,
        lengths: HostLengths | PromptLimits | None,
        *,
        has_pending: bool,
    ) -> Step:
        """Make a step, resolve its pending tokens and build its metadata.

        The work may be captured.

        Args:
            hints: counts of the step.
            inputs: arrays of the step on the model's device.
            sampling: how a device samples its tokens.
            lengths: token counts of its rows in host memory, or their limits, if they are known.
            has_pending: True if the step may have pending tokens.
        """
        backend = self.attn_backends[0]
        self.forward_meta = step = Step(*inputs, self.caches, backend, sampling)
        if self.device_steps is not None and has_pending:
            self.device_steps.resolve_pending(step)
        arrays = *inputs.lengths, inputs.block_tables, inputs.snapshot_slots
        backend.build_step(step, arrays, hints, lengths)
        return step

    def run_padded(self, key: GraphKey) -> Step:
        """Run the step that `stage` has copied, with the sizes of a graph.

        The work may be captured.

        Returns:
            The step with its logits and hidden states.
        """
        tokens, rows = key.num_tokens, self.input_batch.max_num_seqs
        inputs, sampling = self._on_device().inputs.views(tokens, rows, key.num_sampled)
        limits, is_decode = key.limits, key.limits is None
        hints = StepHints(tokens, 0 if is_decode else tokens, key.max_seqlen_k, tokens)
        step = self._begin(hints, inputs, sampling, limits, has_pending=True)
        self._forward(step, reads_all=is_decode)
        return step

    @property
    def info(self) -> RunnerInfo:
        """Optional parts of the runner, as they are now."""
        return RunnerInfo(
            sampling=self if self.device_steps is not None else None,
            selections=self if self.attn_backends[0].can_read_selections else None,
            counters=self.counters,
            captured_sizes=tuple(self.captured_sizes),
        )

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Numbers of tokens of the captured decode steps, ascending."""
        return self.graphs.sizes if self.graphs else ()

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Run the step in the batch.

        Args:
            logits_indices: int64 [n]; flat tokens whose logits are wanted, n may be 0.

        Returns:
            float32 [n, vocab_size]; on a device valid until the next step.

        Raises:
            ValueError: the batch holds no token, or lengths and tables disagree.
        """
        # logits that are not finite are for the sampler to report
        with paddle.no_grad(), np.errstate(invalid="ignore"):
            logits = self.compute_logits(logits_indices)
            if logits is None or not len(logits_indices):
                return np.empty((0, self.vocab_size), np.float32)
            wanted = logits[: len(logits_indices)]
            if self.device_steps is None:
                return as_numpy(wanted)
            # the one wait of the step
            return self.device_steps.logits_on_host(wanted)

    def enqueue_model(self, logits_indices: np.ndarray, sampling: SamplingInputs) -> None:
        """Enqueue the step in the batch on a device, as SamplingRunner says."""
        with paddle.no_grad():
            self.compute_logits(logits_indices, sampling)
            self._num_samples = len(sampling.batch_rows)

    def sample(self, masks: Sequence[np.ndarray] = ()) -> StepFuture:
        """Enqueue the sampling of the enqueued step, as SamplingRunner says."""
        steps = self._on_device()
        if masks:
            steps.sampler.set_masks(np.stack(masks))
        with paddle.no_grad():
            if self._graph is not None:
                self._graph.sample()
            else:
                steps.sample(self._newest_step())
            return steps.samples(self._num_samples)

    def set_parameters(
        self,
        batch_row: int,
        parameters: RowParameters,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Set how the tokens of a row are sampled, see SamplingRunner."""
        self._on_device().sampler.set_parameters(
            batch_row, parameters, prompt_token_ids, output_token_ids
        )

    def copy_state(self, source: int, target: int) -> None:
        """Enqueue the copy of a state of a row, see `StateCopy`."""
        assert self.state_copy is not None, "rows have only blocks"
        self.state_copy(source, target)

    def read_drafts(self) -> StepFuture:
        """Enqueue a copy of the token buffer, see SamplingRunner."""
        return self._on_device().read_drafts()

    @property
    def token_buffer(self) -> TokenBuffer:
        """Layout of the token buffer of a device."""
        return self._on_device().buffer

    def seed_drafts(self, next_ids: np.ndarray, places: Sequence[Sequence[int]]) -> None:
        """Set the inputs of `draft` after a step that the host has sampled."""
        self._on_device().seed_drafts(self._newest_step(), next_ids, places)

    def draft(self, num_requests: int, count: int) -> None:
        """Enqueue the layer over the newest step, and its drafts, see DeviceMtpRunner."""
        steps, step, graphs = self._on_device(), self._newest_step(), self.graphs
        longest = min(self.input_batch.max_seqlen_k + count - 1, self.input_batch.max_row_len)
        size = num_requests, longest, count
        with paddle.no_grad():
            if self._graph is not None:
                self._graph.draft()
            else:
                steps.draft(step, num_requests)
            if count > 1:
                replay = graphs.more_drafts(*size) if graphs else None
                (replay or partial(steps.draft_more, step, *size))()

    def compute_logits(
        self, logits_indices: np.ndarray, sampling: SamplingInputs = NO_SAMPLING
    ) -> StepArray | None:
        """Enqueue the step in the batch, and return its logits on the model's device.

        Returns:
            float32 [n, vocab_size], from a graph followed by rows of padding; None if no logits are
            wanted.
        """
        batch = self.input_batch
        if batch.num_tokens == 0:
            raise ValueError("execute_model: the step has no token; call add_row first")
        graphs, begin = self.graphs, time.perf_counter()
        self.graph_key = key = graphs.fitting(batch, logits_indices) if graphs else None
        self._graph = graph = graphs[key] if graphs and key else None
        if graph is None:
            step = self.initialize_forward_meta(logits_indices, sampling)
        else:
            step = graph.step
            self.stage(logits_indices, sampling)
        self.counters.count_step(
            time.perf_counter() - begin,
            batch.num_tokens,
            batch.num_prefill_tokens,
            batch.num_tokens_past(self._max_dense_keys),
            graph is not None,
        )
        if graph is not None:
            self.forward_meta = step
            graph.replay()
        else:
            if self.device_steps is not None:
                num_wanted = len(logits_indices)
                reason = graphs.refusal(batch, num_wanted) if graphs else "not_captured"
                self.counters.eager_steps[reason] += 1
            step.selections = self._selections
            self._forward(step)
        return step.logits

    def _forward(self, step: Step, *, reads_all: bool = False) -> None:
        """Run the model, and set `logits` and `hidden_states` of a step.

        Args:
            step: step with metadata.
            reads_all: True if the logits of all tokens are wanted, in their order.
        """
        hidden = self.model(step.token_ids, step)
        read = hidden if reads_all else rows_at(hidden, step.sampled)
        if num_sampled := step.sampled.shape[0]:
            device = self.device_steps
            memory = None if device is None else device.logits_memory(num_sampled)
            step.logits = self.model.compute_logits(read, memory)
        if self._mtp is not None:
            step.hidden_states = hidden

    def predict_more(
        self, next_ids: np.ndarray, tokens: Sequence[int], follows: Sequence[int] = ()
    ) -> np.ndarray:
        """Run the layer for multi-token prediction over the newest step, see MtpRunner."""
        mtp, hidden = self._mtp, self._newest_step().hidden_states
        assert mtp is not None and hidden is not None, "the model has no layer that drafts"
        with paddle.no_grad(), np.errstate(invalid="ignore"):
            if len(follows):
                hidden = hidden[follows]
                self.initialize_forward_meta()
            step = self._newest_step()
            step.hidden_states = mtp(next_ids, hidden, step)[tokens]
            return mtp.compute_logits(step.hidden_states)

    def _newest_step(self) -> Step:
        """Return the newest step, which has been run or enqueued."""
        assert self.forward_meta is not None, "no step has been run"
        return self.forward_meta

    def _on_device(self) -> DeviceSteps:
        """Return `device_steps` of a runner on a device."""
        assert self.device_steps is not None, "the host samples on a CPU"
        return self.device_steps

    def execute_with_selections(
        self, logits_indices: np.ndarray, tokens: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Run the step and collect selections, see SelectionRunner."""
        selections = self._selections = Selections(tokens)
        try:
            logits = self.execute_model(logits_indices)
        finally:
            self._selections = None
        return logits, selections.positions(self.input_batch)
