"""Worker: the engine with its step's metadata made once, or as engines made it before."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache
from typing import Any

import numpy as np

from benchmarks.workers import gpu_engine

INPUTS = "seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables"


class Engine(gpu_engine.Engine):
    """The engine of `gpu_engine`, changed before it is made.

    Args:
        work: "once"; "every layer": each layer but the first makes the metadata again; "host
            loop": prompts' windows `[ks, ke)` come from a loop on the host that reads the lengths
            back, as before PaddlePaddle/FastDeploy #7598.
        others: of the base.
    """

    def __init__(self, work: str, **others: Any) -> None:
        # the base loads the plug-in before anything imports Paddle
        self._work = work
        super().__init__(**others)

    def prepare(self) -> None:
        """Change the backend's class."""
        if self._work == "every layer":
            _build_in_every_layer()
        elif self._work == "host loop":
            _make_windows_on_the_host()


def _build_in_every_layer() -> None:
    from fd_dsa.attention.backend import DSAAttentionBackend
    from fd_dsa.step import StepMetadataBuilder

    write = DSAAttentionBackend.write

    @cache
    def another(builder: StepMetadataBuilder) -> StepMetadataBuilder:
        return StepMetadataBuilder(*astuple(builder.limits), device=builder.device)

    def build_and_write(self: Any, *keys_and_layer: Any) -> None:
        layer, step = keys_and_layer[-2:]
        if layer.layer_id:
            arrays = tuple(getattr(step, name) for name in INPUTS)
            another(self.builder).build_from(arrays, step.hints)
        write(self, *keys_and_layer)

    DSAAttentionBackend.write = build_and_write  # type: ignore[method-assign, assignment]


def _make_windows_on_the_host() -> None:
    from fd_dsa.attention.backend import DSAAttentionBackend

    begin = DSAAttentionBackend.init_attention_metadata

    def begin_with_loop(self: Any, step: Any) -> None:
        begin(self, step)
        windows = step.indexer_attn_mask_offsets
        if windows is None:
            return
        import paddle

        lengths = (step.seq_lens_encoder, step.seq_lens_decoder)
        # of tensors on a device a copy and a wait
        encoder, decoder = (np.asarray(array).tolist() for array in lengths)
        found, start = [], 0
        for new, cached in zip(encoder, decoder, strict=True):
            for token in range(new):
                found += start, start + cached + token + 1
            start += cached + new if new else 0
        made = paddle.to_tensor(np.array(found, np.int32), place=windows.place)
        if windows.place.is_cpu_place():
            same = made.numpy() == windows.numpy().reshape(-1)[: len(found)]
            assert same.all(), "the loop gives other windows than the step has"

    DSAAttentionBackend.init_attention_metadata = begin_with_loop  # type: ignore[method-assign]
