"""The first projections of an attention on a device: wk in the FP8 GEMM of q_a and kv_a, or not."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the weights are Paddle's tensors")

from fd_dsa.distributed import Group
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import fp8_tensors
from fd_dsa.models.mla import DeepseekV32DSAAttention, down_projections
from fd_dsa.models.registry import config_from_dict, create_model
from fd_dsa.models.weights import HostWeights
from fd_dsa.ops.dense_kernels import quantize_rows
from fd_dsa.startup.memory import weight_bytes
from fd_dsa.tensor import Normed
from tests.kernel_memory import KernelMemory
from tests.models.folders import TINY_FP8, f8, f32
from tests.ops import block_fp8
from tests.runner.tiny import stored_as

pytestmark = pytest.mark.triton

# kv_a ends within a block
SIZES = TINY_FP8 | {"q_lora_rank": 256, "index_head_dim": 128, "kv_lora_rank": 136}
Q_A, WK, KV_A = 256, 128, 140
PREFIX = "model.layers.0.self_attn."
NAMES = tuple(f"{PREFIX}{name}.weight" for name in ("q_a_proj", "indexer.wk", "kv_a_proj_with_mqa"))
ROWS = 9


def attention_in(m: KernelMemory, fields: dict[str, Any], *fp8: str) -> tuple[Any, DeviceWeights]:
    """The attention of a layer in bfloat16, the tensors of these names in FP8."""
    weights = DeviceWeights("bfloat16", m.poisoned, fp8, round_scales=True)
    return DeepseekV32DSAAttention(config_from_dict(fields), 0, weights, PREFIX), weights


def test_one_weight_has_the_parts_and_their_scales(paddle_memory: KernelMemory) -> None:
    """Blocks of q_a, wk and kv_a as stored; columns are the float64 sums of what is quantised."""
    m, rng = paddle_memory, np.random.default_rng(1)
    attention, weights = attention_in(m, SIZES, *NAMES)
    parts = [block_fp8.weight(rng, rows, 160) for rows in (Q_A, WK, KV_A)]
    for name, (codes, scales) in zip(NAMES, parts, strict=True):
        scale = stored_as(f"{name}_scale_inv", f32(scales))
        weights.loaders[name](stored_as(name, f8(codes), scale))
    for name, width in (("q_a_layernorm", Q_A), ("kv_a_layernorm", 136)):
        norm = stored_as(f"{PREFIX}{name}.weight", f32(np.ones(width, np.float32)))
        weights.loaders[f"{PREFIX}{name}.weight"](norm)
    weights.finish()
    codes, scales = (np.concatenate(both) for both in zip(*parts, strict=True))
    np.testing.assert_array_equal(m.get(attention.qkv_a_proj.values), codes)
    np.testing.assert_array_equal(m.get(attention.qkv_a_proj.scales), scales)
    # of powers of two, and neighbours across the borders of the parts differ
    assert (np.abs(np.log2(scales[1:] / scales[:-1])) > 0.5).mean() > 0.7

    x = block_fp8.put(m, rng.standard_normal((ROWS, 160)), "bfloat16")
    rows = quantize_rows(x, True)
    qr, kv_a, index_k = attention.project_qkv_a(Normed(x, rows))
    values = block_fp8.row_values(m.get(rows.codes), m.get(rows.scales))
    every = block_fp8.weight_values(codes, scales)
    # rounded once; of the sums as in test_fp8_gemm
    wanted, step = values @ every.T, 2.0**-10 if m.on_gpu else 2.0**-21
    bound = step * (np.abs(values) @ np.abs(every).T) + 2.0**-8 * np.abs(wanted)
    root = np.sqrt((wanted[:, :Q_A] ** 2).mean(axis=1, keepdims=True))
    found = np.concatenate([block_fp8.get(m, one) for one in (qr.plain, index_k, kv_a)], axis=1)
    assert (np.abs(found - wanted)[:, Q_A:] <= bound[:, Q_A:]).all()
    # the root is of rounded values too, and so is the result
    assert (np.abs(found[:, :Q_A] * root - wanted[:, :Q_A]) <= 3 * bound[:, :Q_A]).all()


@pytest.mark.parametrize(
    ("fields", "fp8", "is_joined"),
    [
        ({}, NAMES, True),
        ({"q_lora_rank": 1536}, NAMES, True),
        # some or all tensors are stored in bfloat16
        ({}, (), False),
        ({}, NAMES[::2], False),
        ({}, NAMES[:2], False),
        ({}, NAMES[1:], False),
        # a part that would begin within a block, and a bias
        ({"q_lora_rank": 200}, NAMES, False),
        ({"index_head_dim": 64}, NAMES, False),
        ({"attention_bias": True}, NAMES, False),
    ],
)
def test_what_decides(
    paddle_memory: KernelMemory, fields: dict[str, Any], fp8: tuple[str, ...], is_joined: bool
) -> None:
    config = config_from_dict(SIZES | fields)
    assert config.attention_bias == ("attention_bias" in fields)
    rows = down_projections(config, PREFIX, fp8)
    assert (NAMES[1] in rows) == is_joined
    weights = DeviceWeights("bfloat16", paddle_memory.poisoned, fp8)
    attention = DeepseekV32DSAAttention(config, 0, weights, PREFIX)
    assert attention.qkv_a_proj.values.shape[0] == sum(rows.values())
    own = attention.indexer.wk_weights_proj
    widths = [config.index_head_dim] * (not is_joined) + [config.index_n_heads]
    assert [weight.shape[1] for weight in own] == widths


def test_a_cpu_has_wk_beside_weights_proj() -> None:
    config = config_from_dict(SIZES)
    attention = DeepseekV32DSAAttention(config, 0, HostWeights(), "")
    assert attention.qkv_a_proj.out_width == Q_A + KV_A
    assert attention.indexer is not None
    assert attention.indexer.wk_weights_proj.out_width == WK + config.index_n_heads


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_layer_of_every_rank_has_them_and_the_plan_counts_them(
    paddle_memory: KernelMemory, ranks: int
) -> None:
    """The layer for multi-token prediction, too."""
    sizes = SIZES | {"moe_intermediate_size": 256, "intermediate_size": 256}
    config = config_from_dict(sizes).with_mtp_layer()
    fp8, num_bytes = fp8_tensors(None, config), 0

    def counted(shape: tuple[int, ...], dtype: str) -> Any:
        nonlocal num_bytes
        num_bytes += prod(shape) * {"float32": 4, "bfloat16": 2, "uint8": 1}[dtype]
        return paddle_memory.poisoned(shape, dtype)

    group = cast(Group, SimpleNamespace(rank=0, size=ranks))
    weights = DeviceWeights("bfloat16", counted, fp8, round_scales=True, group=group)
    model = create_model(config.split(ranks), weights)
    for layer in (*model.layers, model.mtp.layer):
        assert layer.self_attn.qkv_a_proj.values.shape[0] == Q_A + WK + KV_A
        assert len(layer.self_attn.indexer.wk_weights_proj) == 1
    assert weights.loaders.keys() == expected_tensors(config.split(ranks)).keys()
    assert num_bytes - 4 * prod(model.cos_sin.shape) == weight_bytes(
        config.split(ranks), "bfloat16", fp8
    )
