"""Attention layers of the demo model in a tree, and steps for them."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np
import paddle

from fd_dsa.config import demo_model_path
from tests.fastdeploy_plugin.names import MODELS, registered_model
from tests.fastdeploy_plugin.steps import NUM_BLOCKS, caches, config, int32

PREFIX = "model.layers.{}.self_attn."
HIDDEN = 384


def weights() -> dict[str, np.ndarray]:
    """Tensors of the demo checkpoint by name."""
    read = import_module("fastdeploy.worker.checkpoint").read_checkpoint
    return dict(read(demo_model_path()))


def make_layer(fd_config: Any = None, layer_id: int = 0, loaded: bool = True) -> Any:
    """Attention layer of the tree: FastDeploy's, with the class that our model gives it."""
    models, served = sys.modules[MODELS], registered_model().layer_classes
    fd_config = config() if fd_config is None else fd_config
    prefix = PREFIX.format(layer_id)
    layer = models.DeepseekV32DSAAttention(
        fd_config=fd_config, layer_id=layer_id, prefix=prefix.removesuffix(".")
    )
    for one in (layer, layer.indexer):
        one.__class__ = served[type(one)]
        one.adopt(fd_config)
    if loaded:
        parts = {
            name.removeprefix(prefix): array
            for name, array in weights().items()
            if name.startswith(prefix)
        }
        dense = import_module(f"{MODELS.rpartition('.')[0]}.dense")
        dense.load_into(layer, parts.items())
    layer.eval()
    return layer


def hidden_states(num_tokens: int, seed: int = 0) -> Any:
    """[num_tokens, HIDDEN], of the size of normed activations."""
    rng = np.random.default_rng(seed)
    return paddle.to_tensor(rng.standard_normal((num_tokens, HIDDEN), np.float32))


class Rows:
    """Steps of a few rows on one set of caches, in FastDeploy's form.

    Args:
        backend: ours, of a tree.
        num_layers: for the caches.
    """

    def __init__(self, backend: Any, num_layers: int = 1) -> None:
        self.backend, self.caches = backend, caches(backend, num_layers)
        # rows of four blocks each, in no order
        blocks = np.random.default_rng(5).permutation(NUM_BLOCKS).astype(np.int32)
        self.tables = blocks.reshape(-1, 4)

    def step(self, rows: list[tuple[int, int, int]], launched: int | None = None) -> Any:
        """A prepared step of rows (encoder, decoder, this_time)."""
        encoder, decoder, now = (list(one) for one in zip(*rows, strict=True))
        module = import_module("fastdeploy.model_executor.forward_meta")
        num_tokens = sum(now) if launched is None else launched
        meta = module.ForwardMeta(
            ids_remove_padding=paddle.zeros([num_tokens], dtype="int64"),
            attn_backend=self.backend,
            caches=self.caches,
            max_len_tensor_cpu=paddle.zeros([6], dtype="int32"),
            seq_lens_encoder=int32(encoder),
            seq_lens_decoder=int32(decoder),
            seq_lens_this_time=int32(now),
            block_tables=int32(self.tables[: len(rows)]),
        )
        self.backend.init_attention_metadata(meta)
        return meta
