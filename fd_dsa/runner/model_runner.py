"""Runs a model on the rows of an InputBatch, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig
from fd_dsa.models.config import ModelConfig
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.ops.linear import rows_at
from fd_dsa.runner.counters import StepCounters
from fd_dsa.runner.input_batch import Draw, InputBatch
from fd_dsa.runner.preparation import Preparation
from fd_dsa.runner.protocol import RunnerInfo
from fd_dsa.runner.selections import Selections
from fd_dsa.runner.step import Step, host_inputs
from fd_dsa.runner.step_graphs import PaddedStep, QueuedStep, StepGraphs
from fd_dsa.step import StepHints

if TYPE_CHECKING:
    from fd_dsa.runner.device_draws import DeviceDraws
    from fd_dsa.runner.device_step import DeviceInputs

_NOTHING, _NO_DRAW = np.empty(0, np.int64), Draw()


def backend_config(
    config: ModelConfig,
    layout: CacheLayout,
    batch: InputBatch,
    num_blocks: int | None = None,
    dtype: str = "float32",
) -> DSABackendConfig:
    """What the attention backend must know of a model, its caches and the batch it serves."""
    return DSABackendConfig(
        num_heads=config.num_attention_heads,
        index_n_heads=config.index_n_heads,
        index_topk=config.index_topk,
        softmax_scale=config.softmax_scale,
        cache_layout=layout,
        max_num_seqs=batch.max_num_seqs,
        max_num_tokens=batch.max_num_tokens,
        max_blocks_per_seq=batch.block_tables.shape[1],
        num_blocks=num_blocks,
        dtype=dtype,
        head_widths=(config.qk_nope_head_dim, config.v_head_dim),
    )


class ModelRunner(Preparation):
    """Runs one model over one batch: a Step, the backend's metadata, one forward, logits.

    Caches, metadata and slots are the attention backend's: a model with other caches brings its
    own, which has `allocate_caches`, `init_attention_metadata`, `warm_up` and what its layers call.

    Args:
        model: a model of `fd_dsa.models.registry`, its weights loaded.
        input_batch: rows that the engine fills.
        layout: of the caches; None with a `backend`, which has its own.
        num_blocks: blocks of each cache.
        device: "cpu", "gpu:0" or a custom device of Paddle, where the model is already.
        backend: the attention backend; None: a DSAAttentionBackend.
        dtype: of the model's activations.
        most_drafts: of a row in a step, drawn on a device.

    Attributes:
        attn_backends: the one that serves.
        forward_meta: the newest step, None before the first.
        counters: of the steps that were run.
        graphs: those of decode steps; None where all steps are eager.
        draws: draws tokens from logits on a device; None on a CPU.
        padded_step: sizes of the graph that the newest step replayed; None after an eager step.
        hidden_states: [num_tokens, hidden_size] of the newest eager step, normed, which the MTP
            layer reads; None without such a layer.
    """

    def __init__(
        self,
        model: Any,
        input_batch: InputBatch,
        layout: CacheLayout | None,
        num_blocks: int,
        device: str = "cpu",
        backend: Any = None,
        dtype: str = "float32",
        most_drafts: int = 0,
    ) -> None:
        self.model, self.input_batch, self._device = model, input_batch, device
        config = model.config
        self.vocab_size, self._most_dense_keys = config.vocab_size, config.most_dense_keys
        if backend is None:
            assert layout is not None
            sizes = backend_config(config, layout, input_batch, num_blocks, dtype)
            backend = DSAAttentionBackend(sizes, device)
        self.attn_backends: list[Any] = [backend]
        self.caches = backend.allocate_caches(config.has_indexer)
        self.forward_meta: Any = None
        self.counters = StepCounters()
        self.graphs: StepGraphs | None = None
        self.padded_step: PaddedStep | None = None
        self.most_drafts = most_drafts
        # the step whose tokens are yet to be drawn or sampled, and how they will be drawn
        self._queued: QueuedStep | None = None
        self._draw = _NO_DRAW
        self._selections: Selections | None = None
        # layer for multi-token prediction
        self._mtp, self.hidden_states = getattr(model, "mtp", None), None
        self._to_device: DeviceInputs | None = None
        self._to_host: Callable[[Any], np.ndarray] = as_numpy
        self.draws: DeviceDraws | None = None
        if device != "cpu":
            # kernels and their launcher are loaded only where a device is asked for
            from fd_dsa.device.allocation import paddle_allocator
            from fd_dsa.runner.device_draws import DeviceDraws
            from fd_dsa.runner.device_step import DeviceInputs, HostLogits

            allocate, sizes = paddle_allocator(device), (input_batch.max_num_seqs, self.vocab_size)
            self._to_device = DeviceInputs(
                input_batch, allocate, most_drafts, reads_next=self._mtp is not None
            )
            self._to_host = HostLogits(self._to_device.staging.transfers, prod(sizes))
            self.draws = DeviceDraws(*sizes, allocate, most_drafts, model)

    def initialize_forward_meta(
        self, sampled: np.ndarray = _NOTHING, draw: Draw = _NO_DRAW
    ) -> Step:
        """The step of the rows that the batch holds, its metadata made; also in `forward_meta`.

        Args:
            sampled: int64 [n]; flat tokens whose logits are asked for.
            draw: of a token from each of them.

        Raises:
            ValueError: inconsistent lengths or block tables, with row and value.
        """
        batch, backend = self.input_batch, self.attn_backends[0]
        tokens = batch.num_tokens
        hints = StepHints(tokens, batch.num_prefill_tokens, batch.max_seqlen_k)
        inputs: Any
        placed = None
        if self._to_device is not None:
            lengths = self._stage(sampled, draw)[1:4]
            inputs, placed = self._to_device.views(tokens, batch.num_rows, len(sampled))
        else:
            inputs = host_inputs(batch, sampled)
            lengths = inputs[1:4]
            if self._mtp is not None:
                # the layer runs when rows that have ended have lost their blocks
                inputs = (*inputs[:-1], inputs[-1].copy())
        step = Step(hints, *inputs, self.caches, backend, placed, host_lengths=lengths)
        self._begin(step, has_pending=batch.has_pending)
        return step

    def _stage(self, sampled: np.ndarray, draw: Draw) -> tuple[np.ndarray, ...]:
        """Queue the copy of the step in the batch and of its draw; the step as of `host_inputs`."""
        assert self._to_device is not None and self.draws is not None
        batch, next_ids = self.input_batch, ()
        if draw.slots and self._mtp is not None:
            next_ids = batch.next_tokens(sampled, self.draws.buffer.sample)
        inputs = host_inputs(batch, sampled)
        self._to_device.stage(inputs, draw, next_ids)
        return inputs

    def _begin(self, step: Step, has_pending: bool) -> None:
        """Resolve the pending tokens of a step and make its metadata, which may be captured."""
        self.forward_meta = step
        if self.draws is not None and has_pending:
            self.draws.follow(step)
        step.attn_backend.init_attention_metadata(step)

    @property
    def info(self) -> RunnerInfo:
        """Optional parts of the runner, as they are now."""
        return RunnerInfo(
            sampling=self if self.draws is not None else None,
            selections=self if self.shows_selections else None,
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
            if logits is None:
                return np.empty((0, self.vocab_size), np.float32)
            # on a device this is the step's one wait
            return self._to_host(logits[: len(logits_indices)])

    def queue_model(self, logits_indices: np.ndarray, draw: Draw) -> None:
        """Queue the step in the batch, where there are `draws`; `draw` comes before the next one.

        Args:
            logits_indices: as of `execute_model`; at least one.
            draw: of a token from each of them.
        """
        with paddle.no_grad():
            self.compute_logits(logits_indices, draw)
            self._draw = draw

    def draw(self, masks: Sequence[np.ndarray] = ()) -> Callable[[], np.ndarray]:
        """Queue the draw of the step that was queued.

        Args:
            masks: of its masked rows, see `DeviceSampler.set_masks`.

        Returns:
            See `DeviceDraws.results`.
        """
        draws, queued = self.draws, self._queued
        assert draws is not None and queued is not None
        if masks:
            draws.set_masks(np.stack(masks))
        with paddle.no_grad():
            queued.draw()
            return draws.results(len(self._draw.slots))

    def draft(self, num_requests: int, count: int) -> None:
        """Queue the layer that drafts, over the step that was queued, and its drafts.

        Args:
            num_requests: that go on, at most.
            count: drafts of each; the first one comes with the layer in any case.
        """
        draws, queued, graphs = self.draws, self._queued, self.graphs
        assert draws is not None and queued is not None
        longest = min(self.input_batch.max_seqlen_k + count - 1, self._longest_row())
        size = num_requests, longest, count
        with paddle.no_grad():
            queued.draft(num_requests)
            if count > 1:
                replay = graphs.more_drafts(*size) if graphs else None
                (replay or partial(draws.queue_more_drafts, queued.step, *size))()

    def compute_logits(self, logits_indices: np.ndarray, draw: Draw = _NO_DRAW) -> Any:
        """The step's logits where the model is, float32 [n, vocab_size]; None of no token.

        Those of graphs are followed by those of padding.
        """
        batch = self.input_batch
        if batch.num_tokens == 0:
            raise ValueError("execute_model: the step has no token; call add_row first")
        graphs, begin = self.graphs, time.perf_counter()
        self.padded_step = padded = graphs and graphs.fitting(batch, logits_indices)
        self._queued = queued = graphs[padded] if graphs and padded else None
        if queued is None:
            step = self.initialize_forward_meta(logits_indices, draw)
        else:
            self._stage(logits_indices, draw)
        self.counters.count_step(
            time.perf_counter() - begin,
            batch.num_tokens,
            batch.num_prefill_tokens,
            batch.num_tokens_past(self._most_dense_keys),
        )
        if queued is not None:
            self.forward_meta = queued.step
            queued.replay()
            return queued.logits
        step.selections = self._selections
        logits, self.hidden_states = self._forward(step)
        if (draws := self.draws) is not None:
            draw_it = partial(draws.queue, logits, step)
            draft = partial(draws.queue_drafts, self.hidden_states, step)
            self._queued = QueuedStep(step, logits, self.hidden_states, draw_it, draft)
        return logits

    def _forward(self, step: Step, *, reads_all: bool = False) -> tuple[Any, Any]:
        """Logits of the tokens that a step asks for, or of all; None of no token.

        And what a layer more reads, hidden states of all tokens; None without such a layer.
        """
        hidden = self.model(step.ids_remove_padding, step)
        read = hidden if reads_all else rows_at(hidden, step.sampled)
        logits = self.model.compute_logits(read) if step.sampled.shape[0] else None
        return logits, None if self._mtp is None else hidden

    def predict_more(
        self, next_ids: np.ndarray, tokens: Sequence[int], follows: Sequence[int] = ()
    ) -> np.ndarray:
        """Run the layer for multi-token prediction over the step that ran last, on a CPU.

        Args:
            next_ids: int64 [num_tokens]; the token after each one of the step.
            tokens: flat tokens to go on from, n may be 0.
            follows: run it over a new step instead, that in the batch, on the layer's own hidden
                states: for each token the place among `tokens` of the call before.

        Returns:
            float32 [n, vocab_size]; logits of the token after the next one.
        """
        mtp = self._mtp
        with paddle.no_grad(), np.errstate(invalid="ignore"):
            if len(follows):
                self.hidden_states = self.hidden_states[follows]
                self.initialize_forward_meta()
            self.hidden_states = mtp(next_ids, self.hidden_states, self.forward_meta)[tokens]
            return mtp.head.times(self.hidden_states)  # type: ignore[no-any-return]

    @property
    def shows_selections(self) -> bool:
        """Whether `execute_watched` can be called: what a device chose stays in its memory."""
        backend = self.attn_backends[0]
        return self._device == "cpu" and getattr(backend, "shows_selections", True)

    def execute_watched(
        self, logits_indices: np.ndarray, tokens: Sequence[int]
    ) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """`execute_model`, and what the layers chose for some of the tokens.

        Args:
            logits_indices: as of `execute_model`.
            tokens: flat tokens of the step.

        Returns:
            The logits; and for each token and layer, int64 [n], ascending: positions in its row.
        """
        selections = self._selections = Selections(tokens)
        try:
            logits = self.execute_model(logits_indices)
        finally:
            self._selections = None
        return logits, selections.positions(self.input_batch)
