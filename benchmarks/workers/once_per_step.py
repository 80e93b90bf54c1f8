"""Worker: the engine with its step's metadata made once, or in every layer as in FastDeploy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._harness import random_prompts
from benchmarks.workers import gpu_engine


class Engine(gpu_engine.Engine):
    """The engine of `gpu_engine`, changed before it is made.

    Args:
        work: "once"; "two chains": each layer makes the slots twice, by FastDeploy's operators
            before #7367; "host loop": each layer makes the windows of prompts in a loop over the
            requests, as FastDeploy's before #7598; "launches in every layer": each layer of
            DeepSeek-V4 makes the index arrays of the step again, by the engine's own launches.
        others: options of the base.
    """

    def __init__(self, work: str, **others: Any) -> None:
        # the base loads the plug-in before anything imports Paddle
        self._work, self._rebuilds = work, True
        self._prefix: list[int] = []
        super().__init__(**others)

    def prepare(self) -> None:
        """Add the other form's work to every layer."""
        if self._work == "two chains":
            _before_each_layer(_SlotChains())
        elif self._work == "host loop":
            _before_each_layer(_WindowLoop())
        elif self._work == "launches in every layer":
            _rebuild_in_each_layer(lambda: self._rebuilds)

    def rebuild(self, rebuilds: bool) -> None:
        """Make the index arrays of eager steps in every layer from now on, or once."""
        self._rebuilds = rebuilds

    def after(self, prefix: int, prompt: int) -> dict[str, Any]:
        """Return prompt tokens per second of a prompt after `prefix` cached tokens."""
        from fd_dsa import SamplingParams

        self._num_runs += 1
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        vocab_size = self._engine.runner.vocab_size
        if len(self._prefix) != prefix:
            self._prefix = random_prompts(1, prefix, vocab_size, 0)[0]
            # one more token, so that the last block of the prefix is cached too
            self._engine.add_request(f"prefix-{prefix}", [*self._prefix, 1], params)
            self._drain()
        new = random_prompts(1, prompt, vocab_size, self._num_runs)[0]
        begin, outputs = time.perf_counter(), []
        self._engine.add_request(f"after-{self._num_runs}", [*self._prefix, *new], params)
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        seconds, cached = time.perf_counter() - begin, outputs[-1].num_cached_tokens
        if cached != prefix:
            raise RuntimeError(f"{cached} of {prefix} tokens were cached")
        return {"tok_s": prompt / seconds}


def _before_each_layer(work: Callable[[Any, Any], None]) -> None:
    """Do some work of a backend and a step before each layer writes its keys."""
    from fd_dsa.attention.backend import DSAAttentionBackend

    write = DSAAttentionBackend.write

    def work_and_write(self: Any, *keys_and_layer: Any) -> None:
        work(self, self.current_step(keys_and_layer[-1]))
        write(self, *keys_and_layer)

    DSAAttentionBackend.write = work_and_write  # type: ignore[method-assign, assignment]


def _rebuild_in_each_layer(is_wanted: Callable[[], bool]) -> None:
    """Make the index arrays of a step again before each layer of DeepSeek-V4 but the first.

    Args:
        is_wanted: returns False in steps that make them once.
    """
    from fd_dsa.v4_attention.backend import V4AttentionBackend
    from fd_dsa.v4_attention.device_backend import V4DeviceBackend

    classes: tuple[Any, ...] = V4AttentionBackend, V4DeviceBackend
    for backend in classes:
        _rebuild_in_layers_of(backend, is_wanted)


def _rebuild_in_layers_of(backend: Any, is_wanted: Callable[[], bool]) -> None:
    """Wrap the methods of a class of backends, which keeps the arguments of the newest step."""
    build_step, forward = backend.build_step, backend.forward

    def kept(self: Any, *given: Any) -> None:
        self.newest_step = given
        build_step(self, *given)

    def built_and_run(self: Any, layer: Any, *given: Any) -> Any:
        if layer.layer_id and is_wanted():
            build_step(self, *self.newest_step)
        return forward(self, layer, *given)

    backend.build_step, backend.forward = kept, built_and_run


class _SlotChains:
    """Two chains of operators. The slots of the first chain are compared with the step's."""

    def __init__(self) -> None:
        self._is_checked = False

    def __call__(self, backend: Any, step: Any) -> None:
        from benchmarks._operator_chains import slot_chain, values_of

        by_kernels = step.position_ids.place.is_custom_place()
        slots = [slot_chain(step, backend.block_size, by_kernels) for _ in range(2)]
        if not self._is_checked:
            self._is_checked = True
            live = values_of(step.batch_id_per_token, "int32") >= 0
            found, wanted = (values_of(x, "int64")[live] for x in (slots[1], step.slot_mapping))
            np.testing.assert_array_equal(found, wanted)


class _WindowLoop:
    """The loop over requests. Its first windows are compared with the step's."""

    def __init__(self) -> None:
        self._is_checked = False

    def __call__(self, backend: Any, step: Any) -> None:
        from benchmarks._operator_chains import values_of, write_windows

        if step.num_prefill_tokens == 0:
            return
        offsets = step.indexer_attn_mask_offsets
        before = None if self._is_checked else values_of(offsets, "int32")
        write_windows(step, by_kernels=offsets.place.is_custom_place())
        if before is not None:
            self._is_checked = True
            np.testing.assert_array_equal(values_of(offsets, "int32"), before)
