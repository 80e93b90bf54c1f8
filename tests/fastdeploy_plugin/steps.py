"""A backend of ours as FastDeploy would construct it, and steps for it on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import paddle

from fd_dsa.config import demo_model_path
from fd_dsa.ops.cache_write import CacheWriteParams
from tests.fakes import golden
from tests.fakes.trees import BROKEN, OURS_ENV, TREES, installed
from tests.fastdeploy_plugin.names import ATTENTION, WORKER

NUM_BLOCKS = 16


@contextmanager
def registered(name: str = "develop") -> Iterator[None]:
    """A tree with our plug-in in it."""
    with installed({**TREES, **BROKEN}[name], OURS_ENV):
        import_module(WORKER)
        yield


def config(**overrides: Any) -> Any:
    """FastDeploy's configuration of the demo model."""
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    make = import_module("fastdeploy.config").fd_config
    return make(demo_model_path(), **{**sizes, **overrides})


def construct(backend_class: type, fd_config: Any, num_heads: int = 8) -> Any:
    """A backend as `GPUModelRunner._initialize_attn_backend` makes it, by keywords."""
    return backend_class(
        fd_config,
        kv_num_heads=1,
        num_heads=num_heads,
        head_dim=fd_config.model_config.head_dim,
        encoder_block_shape_q=64,
        decoder_block_shape_q=16,
    )


def make_backend(fd_config: Any = None, num_heads: int = 8) -> Any:
    """Ours, through FastDeploy's own selection, for a runner of ours."""
    select = sys.modules[ATTENTION].get_attention_backend
    backend = construct(select(), config() if fd_config is None else fd_config, num_heads)
    backend.serve_runner("int32")
    return backend


def upstream_class() -> Any:
    """FastDeploy's own backend, from which ours derives."""
    return sys.modules[f"{ATTENTION}.dsa_attention_backend"].DSAAttentionBackend


def caches(backend: Any, num_layers: int = 1, num_blocks: int = NUM_BLOCKS) -> list[Any]:
    """Zeroed caches of all layers, in FastDeploy's order."""
    key, _, index = backend.get_kv_cache_shape(
        max_num_blocks=num_blocks, kv_cache_quant_type="uint8"
    )
    return [paddle.zeros(shape, dtype="uint8") for _ in range(num_layers) for shape in (key, index)]


def forward_meta(backend: Any, num_tokens: int = golden.NUM_TOKENS, **overrides: Any) -> Any:
    """A ForwardMeta of the worked step, or of one with other lengths or tables."""
    module = import_module("fastdeploy.model_executor.forward_meta")
    fields = {
        "caches": caches(backend),
        "max_len_tensor_cpu": paddle.zeros([6], dtype="int32"),
        **golden.tensors(),
        **overrides,
    }
    ids = paddle.zeros([num_tokens], dtype="int64")
    return module.ForwardMeta(ids_remove_padding=ids, attn_backend=backend, **fields)


def int32(values: Any) -> Any:
    """An int32 tensor."""
    return paddle.to_tensor(np.asarray(values, np.int32))


def values(tensor: Any) -> list[Any]:
    """A tensor's values as a list."""
    return np.asarray(tensor).tolist()


def write(backend: Any, meta: Any, layer_id: int = 0) -> None:
    """A prepared step, and a layer of it that writes its latents: the worked step."""
    backend.init_attention_metadata(meta)
    keys = np.random.default_rng(0).standard_normal((golden.NUM_TOKENS, 576), np.float32)
    unit = np.tile(np.float32([1, 0]).repeat(32), (256, 1))
    params = CacheWriteParams("fp8_ds_mla")
    backend.write_layer(paddle.to_tensor(keys), None, unit, params, layer_id, meta)
