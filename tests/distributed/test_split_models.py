"""Models whose ranks hold a part each give the logits of the whole, and the same selections."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("paddle")

from fd_dsa.attention import step_plan
from fd_dsa.config import EngineConfig
from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup
from fd_dsa.errors import ConfigError
from fd_dsa.models import loader
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import (
    fp8_tensors,
    load_dummy_weights,
    load_weights,
    validate,
    with_whole_blocks,
)
from fd_dsa.models.registry import config_from_dict, create_model
from fd_dsa.models.sources import MTP_EMBEDDING, MTP_HEAD, MTP_JOIN
from fd_dsa.models.weights import HostWeights
from fd_dsa.startup import memory, plan
from fd_dsa.startup.memory import weight_bytes
from fd_dsa.startup.plan import make_plan
from tests.distributed.groups import on_ranks
from tests.kernel_memory import KernelMemory
from tests.models.folders import SCALE_SUFFIX, TINY_FP8, Stored, f8, f32, write_folder
from tests.ops import block_fp8
from tests.runner.tiny import GLM, V32, random_tensors, tiny_runner

WIDE = {"num_attention_heads": 12, "num_key_value_heads": 12, "moe_intermediate_size": 24}
WIDE |= {"intermediate_size": 48, "vocab_size": 60}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v32": V32 | WIDE,
    # an output bias, which counts once
    "glm": GLM | WIDE | {"attention_bias": True},
    # no head to split, and one that cannot be
    "tied": V32 | WIDE | {"tie_word_embeddings": True},
    "uneven": V32 | WIDE | {"vocab_size": 61},
}


def run(config: ModelConfig, group: HostGroup | None, folder: Path | None) -> list[Any]:
    """Logits and selections of a prompt of two rows, and of a decode step."""
    size = group.size if group else 1
    weights = HostWeights(group)
    model = create_model(config.split(size), weights)
    if folder is None:
        load_dummy_weights(config, weights.loaders, 3, group=group)
    else:
        with Checkpoint.open(folder) as checkpoint:
            validate(checkpoint, config)
            load_weights(checkpoint, config, weights.loaders, group=group)
    runner = tiny_runner(model)
    found: list[Any] = []
    draw = np.random.default_rng(1)
    for rows in ([(0, 30, 0, True), (2, 17, 0, True)], [(0, 1, 30, False), (2, 1, 17, False)]):
        runner.input_batch.begin_step()
        for row, count, done, is_prefill in rows:
            ids = draw.integers(0, config.vocab_size, count).tolist()
            runner.input_batch.add_row(row, ids, done, is_prefill)
        tokens = np.arange(runner.input_batch.num_tokens)
        found.append(runner.execute_with_selections(tokens, tokens.tolist()))
    return found


def check(config: ModelConfig, size: int, folder: Path | None = None) -> None:
    whole = run(config, None, folder)
    ranks = on_ranks(size, lambda group: run(config, group, folder))
    for step, (expected, chosen) in enumerate(whole):
        for found in ranks:
            logits, selections = found[step]
            np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
            # to the bit the same on all ranks
            np.testing.assert_array_equal(logits, ranks[0][step][0])
            for one, other in zip(selections, chosen, strict=True):
                for layer, expected_layer in zip(one, other, strict=True):
                    np.testing.assert_array_equal(layer, expected_layer)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("deepseek_v32", size) for size in (2, 3, 4)),
        *(("glm", 2), ("glm", 4), ("tied", 3), ("uneven", 2)),
    ],
)
def test_ranks_give_the_logits_of_the_whole_and_choose_alike(
    name: str, size: int, tmp_path: Path
) -> None:
    config = config_from_dict(MODELS[name])
    tensors = {name: f32(array) for name, array in random_tensors(config).items()}
    check(config, size, write_folder(tmp_path / "model", MODELS[name], tensors))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_that_divide_the_scores_choose_alike(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "5")
    # several tiles, which the ranks divide
    monkeypatch.setattr(step_plan, "SCORE_TILE_VALUES", 1024)
    bounds: set[tuple[int, ...]] = set()

    def gather(self: HostGroup, rows: np.ndarray, given: list[int]) -> None:
        bounds.add(tuple(given))
        original(self, rows, given)

    original = HostGroup.all_gather_rows
    monkeypatch.setattr(HostGroup, "all_gather_rows", gather)
    config = config_from_dict(MODELS["deepseek_v32"])
    check(config, size)
    # the prompts of one step, and no decode step
    assert [len(set(one)) for one in bounds] == [size + 1]


def test_random_weights_are_those_of_the_whole() -> None:
    check(config_from_dict(MODELS["deepseek_v32"]), 2)


def with_fp8(config: ModelConfig, names: Collection[str]) -> dict[str, Stored]:
    """Random tensors, those of these names in FP8 with other scales in each block."""
    tensors = {name: f32(array) for name, array in random_tensors(config).items()}
    draw = np.random.default_rng(2)
    for name in names:
        rows, columns = tensors[name].shape
        signs = draw.integers(0, 2, (rows, columns)) << 7
        tensors[name] = f8(draw.integers(0x20, 0x38, (rows, columns)) | signs)
        blocks = -(-rows // 128), -(-columns // 128)
        scales = draw.uniform(1, 3, blocks) / np.sqrt(columns)
        tensors[name + SCALE_SUFFIX] = f32(scales.astype(np.float32))
    return tensors


def test_ranks_read_their_parts_of_fp8_files(tmp_path: Path) -> None:
    """Of the dense MLP whole blocks; the borders of heads cut blocks."""
    fields = TINY_FP8 | WIDE | {"index_n_heads": 16, "index_topk": 12, "intermediate_size": 768}
    config = config_from_dict(fields)
    ends = ".o_proj.weight", ".q_b_proj.weight", "0.mlp.up_proj.weight", "0.mlp.down_proj.weight"
    names = [name for name in expected_tensors(config) if name.endswith(ends)]
    tensors = with_fp8(config, names)
    check(config, 2, write_folder(tmp_path / "model", fields, tensors))


DEVICE_FP8 = TINY_FP8 | {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512}
DEVICE_FP8 |= {"moe_intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128}
DEVICE_FP8 |= {"num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 128}
DEVICE_FP8 |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "index_head_dim": 128}


def parts_of_layers(
    m: KernelMemory, config: ModelConfig, folder: Path, rank: int, size: int
) -> dict[str, Any]:
    """Compute a rank's parts of the same inputs: its heads [tokens, heads, width] and its sums."""
    group = cast(Group, SimpleNamespace(rank=rank, size=size))
    with Checkpoint.open(folder) as checkpoint:
        # those of two ranks, also for the whole model
        names = with_whole_blocks(config, 2, fp8_tensors(checkpoint, config))
        weights = DeviceWeights("bfloat16", m.poisoned, names, round_scales=True, group=group)
        model = create_model(config.split(size), weights)
        load_weights(checkpoint, config, weights.loaders, group=group)
    weights.finish()
    draw = np.random.default_rng(5)
    qr, hidden, nope, latent = (
        block_fp8.put(m, draw.standard_normal((9, *shape)), "bfloat16")
        for shape in ((128,), (256,), (4, 64), (4, 128))
    )
    own = slice(rank * 4 // size, (rank + 1) * 4 // size)
    meta = SimpleNamespace(slot_mapping=m.put(np.arange(9)))
    found: dict[str, Any] = {}
    for number, layer in enumerate(model.layers):
        attention = layer.self_attn
        split = attention.q_b_proj, attention.o_proj, *split_matrices(layer.mlp)
        is_cut = number == 1 and config.moe_intermediate_size // 2 < 128
        # the shared expert is twice as wide as the routed ones
        held = [one.scales is not None for one in split]
        assert held == [True, True, not is_cut, not is_cut, True, True][: len(split)]
        queries = attention.q_b_proj.matmul(qr).reshape([9, -1, 128])
        keys = attention.k_b_proj.matmul_by_head(nope[:, own])
        merged = attention.v_b_proj.matmul_join_heads(latent[:, own], attention.o_proj)
        normed = layer.post_attention_layernorm.normalize(hidden)
        sums = attention.o_proj.matmul(merged), layer.mlp.forward(normed, meta)
        found |= {f"{number} heads": (queries, keys), f"{number} sums": sums}
    return {name: [block_fp8.get(m, one) for one in results] for name, results in found.items()}


def split_matrices(mlp: Any) -> tuple[Any, ...]:
    """Weights of an MLP that the ranks split."""
    if hasattr(mlp, "gate"):
        return (*mlp.experts, *split_matrices(mlp.shared_experts))
    return mlp.gate_up_proj, mlp.down_proj


@pytest.mark.triton
@pytest.mark.parametrize("width", [256, 128])
def test_parts_in_fp8_on_a_device_add_up(
    paddle_memory: KernelMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Activations are quantised in the same groups, so only a rounding to bfloat16 differs.

    Two ranks cut the blocks of experts with 128 columns, so these are bfloat16.
    """
    monkeypatch.setattr(loader, "MAX_CUT", 1)
    fields = DEVICE_FP8 | {"moe_intermediate_size": width}
    config = config_from_dict(fields)
    names = [name for name, tensor in expected_tensors(config).items() if tensor.quantisable]
    folder = write_folder(tmp_path / "model", fields, with_fp8(config, names))
    whole = parts_of_layers(paddle_memory, config, folder, 0, 1)
    ranks = [parts_of_layers(paddle_memory, config, folder, rank, 2) for rank in range(2)]
    for name, wanted in whole.items():
        for one, *parts in zip(wanted, *(rank[name] for rank in ranks), strict=True):
            both = np.concatenate(parts, axis=1) if name.endswith("heads") else sum(parts)
            difference = np.sqrt(np.mean((both - one) ** 2) / np.mean(one**2))
            assert difference < 2**-7, (name, difference)


def test_what_cannot_be_split_is_refused_by_name() -> None:
    config = config_from_dict(V32 | WIDE)
    for size, name, width in ((5, "num_attention_heads", 12), (16, "num_attention_heads", 12)):
        with pytest.raises(ConfigError, match=f"-size: got {size}.*model's {name}, {width}; "):
            config.split(size)
    released = config_from_dict({"model_type": "deepseek_v32", "num_hidden_layers": 4})
    names = frozenset(name for name in expected_tensors(released) if "3.mlp.experts" in name)
    assert with_whole_blocks(released, 8, names) == names
    with pytest.raises(ConfigError, match=r"32.*whole blocks of 128.*'model.*gate_proj.weight'"):
        with_whole_blocks(released, 32, names)


def test_a_few_weights_with_cut_blocks_are_held_in_bfloat16(
    caplog: pytest.LogCaptureFixture,
) -> None:
    released = config_from_dict({"model_type": "deepseek_v32", "num_hidden_layers": 4})
    shared = {name for name in expected_tensors(released) if ".shared_experts." in name}
    whole = frozenset({"model.layers.3.self_attn.o_proj.weight"})
    with caplog.at_level(logging.WARNING):
        assert with_whole_blocks(released, 32, whole | shared) == whole
    [record] = caplog.records
    assert record.getMessage() == (
        "3 FP8 weights are held in bfloat16, because 32 ranks would cut their blocks of 128: "
        "'model.layers.3.mlp.shared_experts.gate_proj.weight' [2048, 7168] would be split into "
        "parts of 64"
    )


def test_a_rank_is_planned_with_its_part_of_the_weights() -> None:
    config = config_from_dict({"model_type": "deepseek_v32"})
    whole, part = (weight_bytes(config.split(size), "bfloat16") for size in (1, 4))
    # what every rank has: embedding, q_a, kv_a, indexers, routers, norms
    assert 0.25 * whole < part < 0.27 * whole


def test_a_layer_that_drafts_is_split_as_any_other() -> None:
    fields = {"model_type": "deepseek_v32", "num_nextn_predict_layers": 1}
    whole = config_from_dict(fields).with_mtp_layer(MTP_EMBEDDING, MTP_HEAD)
    parts, prefix = expected_tensors(whole.split(8)), "model.layers.61."
    split = {
        MTP_EMBEDDING: (129280, 7168),
        MTP_HEAD: (129280 // 8, 7168),
        MTP_JOIN: (7168, 14336),
        "self_attn.o_proj.weight": (7168, 2048),
        "mlp.experts.255.down_proj.weight": (7168, 256),
    }
    assert {name: parts[prefix + name].shape for name in split} == split


def test_caches_are_planned_by_the_rank_with_the_least_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = [6 << 30, 2 << 30, 4 << 30, 8 << 30]
    plans = [
        EngineConfig(device="cpu", tensor_parallel_size=size, speculative_config="none")
        for size in (4, 1)
    ]
    for module in (memory, plan):
        monkeypatch.setattr(module, "available_memory_bytes", lambda: free.pop())
    memories = [made.memory for made in on_ranks(4, lambda group: make_plan(plans[0], group))]
    assert memories == memories[:1] * 4
    # on a CPU all ranks have the same memory
    assert memories[0].free_bytes == (2 << 30) // 4
    free.append(2 << 30)
    alone = make_plan(plans[1]).memory
    assert 3 * memories[0].num_blocks < alone.num_blocks
    assert memories[0].bytes_per_block == alone.bytes_per_block
