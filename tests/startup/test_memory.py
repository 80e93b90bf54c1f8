"""The memory plan: what is free, what is needed, and which flag a refusal names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fd_dsa.config import EngineConfig
from fd_dsa.errors import ConfigError
from fd_dsa.models.registry import config_from_dict
from fd_dsa.startup.graph_sizes import activation_bytes, graph_bytes, step_bytes
from fd_dsa.startup.host_memory import available_memory_bytes
from fd_dsa.startup.memory import (
    MemoryPlan,
    format_bytes,
    plan_memory,
    weight_bytes,
)
from tests.models.folders import TINY, TINY_FP8, random_tensors
from tests.models.published import V4_FLASH

GIB = 1 << 30
BLOCK = 1 << 20  # bytes per cache block in these tests


def plan(
    free: int,
    weights: int = 10 * GIB,
    max_model_len: int = 640,
    snapshot_bytes: int = 0,
    **flags: Any,
) -> MemoryPlan:
    return plan_memory(
        EngineConfig(**flags).on_device("cpu").with_blocks(64),
        weight_bytes=weights,
        bytes_per_block=BLOCK,
        max_model_len=max_model_len,
        snapshot_bytes=snapshot_bytes,
        free_bytes=free,
    )


@pytest.mark.parametrize(
    ("free", "arguments", "blocks"),
    [
        # enough for all sequences, below 4 GiB unless one needs more, half of what is free
        (100 * GIB, {"max_num_seqs": 5}, 50),
        (100 * GIB, {"max_model_len": 64 * 1000}, 4096),
        (100 * GIB, {"max_model_len": 64 * 5000 - 1}, 5000),
        (11 * GIB, {}, 512),
        (100 * GIB, {"kv_cache_memory_bytes": "20G"}, 20 * 1024),
        (100 * GIB, {"kv_cache_memory_bytes": 11 * BLOCK - 1}, 10),
        (100 * GIB, {"num_gpu_blocks_override": 77}, 77),
        # partial blocks count in full
        (100 * GIB, {"max_num_seqs": 1, "max_model_len": 641}, 11),
        (100 * GIB, {"max_num_seqs": 1, "max_model_len": 641, "block_size": 1}, 641),
        # an exact fit
        (10 * GIB + 10 * BLOCK, {"kv_cache_memory_bytes": 10 * BLOCK}, 10),
    ],
)
def test_number_of_blocks(free: int, arguments: dict[str, Any], blocks: int) -> None:
    made = plan(free, **arguments)
    assert (made.num_blocks, made.kv_cache_bytes) == (blocks, blocks * BLOCK)
    assert (made.weight_bytes, made.free_bytes) == (10 * GIB, free)


@pytest.mark.parametrize(
    ("free", "arguments", "words"),
    [
        (
            12 * GIB,
            {"kv_cache_memory_bytes": "8G"},
            ["needs 18.0 GiB", "kv cache 8.0 GiB", "lower --kv-cache-memory-bytes"],
        ),
        (12 * GIB, {"num_gpu_blocks_override": 9999}, ["lower --num-gpu-blocks-override"]),
        (
            12 * GIB,
            {"max_model_len": 64 * 5000},
            ["needs 14.9 GiB", "free 12.0 GiB", "lower --max-model-len"],
        ),
        (10 * GIB + 10 * BLOCK - 1, {"kv_cache_memory_bytes": 10 * BLOCK}, ["memory: needs"]),
        (5 * GIB, {}, ["weights 10.0 GiB", "free 5.0 GiB", "weights alone do not fit"]),
        (
            12 * GIB,
            {"max_model_len": 64 * 1500},
            ["1024 cache blocks", "takes 1500 blocks", "raise --kv-cache-memory-bytes"],
        ),
        (
            99 * GIB,
            {"kv_cache_memory_bytes": 9 * BLOCK},
            ["9 cache blocks", "max_model_len 640", "takes 10 blocks (10.0 MiB)"],
        ),
        (
            99 * GIB,
            {"num_gpu_blocks_override": 9},
            ["lower --max-model-len or raise --num-gpu-blocks-override"],
        ),
    ],
)
def test_refusals_have_the_numbers_and_the_flag(
    free: int, arguments: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(free, **arguments)
    message = str(caught.value)
    assert message.startswith("memory: ")
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_summary_is_one_line_with_the_capacity() -> None:
    assert plan(100 * GIB, max_num_seqs=5).summary() == (
        "weights 10.0 GiB, kv cache 50 blocks x 64 = 3200 tokens "
        "(50.0 MiB, 5 full-length requests), free 100.0 GiB"
    )


@pytest.mark.parametrize("fields", [TINY, TINY_FP8, TINY | {"tie_word_embeddings": True}])
def test_weight_bytes_are_those_held_in_float32(fields: dict[str, Any]) -> None:
    held = sum(len(tensor.data) for tensor in random_tensors(fields).values())
    assert weight_bytes(config_from_dict(fields)) == held


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 << 19, int(31.2 * GIB), 2500 * GIB)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "31.2 GiB", "2500.0 GiB",
    ]  # fmt: skip


def _system(tmp_path: Path, cgroup_lines: str) -> tuple[Path, Path]:
    """A made-up /proc with 100 KiB available, and an empty cgroup folder."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    meminfo = "MemTotal:  200 kB\nMemFree:  50 kB\nMemAvailable:   100 kB\n"
    (proc / "meminfo").write_text(meminfo)
    (proc / "self" / "cgroup").write_text(cgroup_lines)
    return proc, cgroup


@pytest.mark.parametrize(("limit", "free"), [("80000", 28_800), ("10", 0), ("unlimited", 102_400)])
def test_what_is_left_of_the_address_space_counts(tmp_path: Path, limit: str, free: int) -> None:
    proc, cgroup = _system(tmp_path, "0::/\n")
    (proc / "self" / "status").write_text("VmPeak:\t   60 kB\nVmSize:\t   50 kB\n")
    line = f"Max address space         {limit:<20} unlimited            bytes     \n"
    (proc / "self" / "limits").write_text(f"Max locked memory  8 8 bytes\n{line}")
    assert available_memory_bytes(proc, cgroup) == free


V1, V2 = ("limit_in_bytes", "usage_in_bytes"), ("max", "current")
STAT = "anon 10\ninactive_file 3000\nactive_file 500\n"
TOTALS = "inactive_file 1\ntotal_inactive_file 2000\ntotal_active_file 100\n"
# lines of /proc/self/cgroup; folder, names, limit, usage and statistics of groups; what is free
GROUPS: dict[str, tuple[str, list[tuple[Any, ...]], int]] = {
    "no limit at all": ("0::/\n", [], 100 * 1024),
    "version 2, pages that can be dropped": (
        "0::/a/b\n",
        [("a/b", V2, 50_000, 20_000, STAT)],
        50_000 - 20_000 + 3_500,
    ),
    "version 2, an outer group": (
        "0::/a/b\n",
        [("a/b", V2, "max", 20_000, ""), ("a", V2, 30_000, 25_000, "")],
        5_000,
    ),
    "version 1": (
        "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
        [("memory/x", V1, 40_000, 15_000, TOTALS)],
        27_100,
    ),
    # inside a container the path of /proc names folders that the mount does not show
    "version 1, used up in a container": (
        "4:memory:/docker/0123\n",
        [("memory", V1, 9_000, 10_000, "")],
        0,
    ),
    "version 1, no limit": (
        "4:memory:/\n",
        [("memory", V1, 9223372036854771712, 10_000, "")],
        100 * 1024,
    ),
}


@pytest.mark.parametrize(("lines", "groups", "free"), GROUPS.values(), ids=GROUPS)
def test_limits_of_control_groups_count(
    tmp_path: Path, lines: str, groups: list[tuple[Any, ...]], free: int
) -> None:
    proc, cgroup = _system(tmp_path, lines)
    for folder, names, *values in groups:
        (cgroup / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip((*names, "stat"), values, strict=True):
            (cgroup / folder / f"memory.{name}").write_text(f"{value}\n")
    assert available_memory_bytes(proc, cgroup) == free


def test_system_without_memavailable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no MemAvailable"):
        available_memory_bytes(tmp_path, tmp_path)


def test_plan_asks_this_machine_by_default() -> None:
    made = plan_memory(
        EngineConfig(max_num_seqs=1, block_size=64),
        weight_bytes=1,
        bytes_per_block=1,
        max_model_len=64,
    )
    assert 0 < made.free_bytes <= available_memory_bytes() * 2
    assert made.num_blocks == 1


def test_graphs_take_their_share_and_are_told() -> None:
    sizes = {"weight_bytes": 10 * GIB, "bytes_per_block": BLOCK, "max_model_len": 640}
    config = EngineConfig(max_num_seqs=9000, block_size=64).on_device("cpu")
    # the limit of 4 GiB is one of hosts
    asked = [plan_memory(config, free_bytes=999 * GIB, takes_all=x, **sizes) for x in (False, True)]
    assert [made.num_blocks for made in asked] == [4096, 90_000]
    made = plan_memory(config, graph_bytes=4 * GIB, free_bytes=16 * GIB, **sizes)
    assert made.num_blocks == 1024 and made.graph_bytes == 4 * GIB
    assert "graphs 4.0 GiB, free 16.0 GiB" in made.summary()
    assert "graphs" not in plan(16 * GIB).summary()
    # the second one leaves just the room for all else
    for graphs, free in ((7 * GIB, 16 * GIB), (GIB, 10 * GIB + 10 * BLOCK)):
        said = rf"\+ graphs {graphs // GIB}.0 GiB\), free 1.*; give fewer .*--enforce-eager"
        with pytest.raises(ConfigError, match=said):
            plan_memory(config, graph_bytes=graphs, free_bytes=free, **sizes)


def test_activations_take_their_share_and_are_told() -> None:
    sizes = {"weight_bytes": 10 * GIB, "bytes_per_block": BLOCK, "max_model_len": 640}
    config = EngineConfig(max_num_seqs=9000, block_size=64).on_device("cpu")
    made = plan_memory(config, activation_bytes=4 * GIB, free_bytes=16 * GIB, **sizes)
    assert made.num_blocks == 1024 and made.activation_bytes == 4 * GIB
    assert "activations 4.0 GiB, free 16.0 GiB" in made.summary()
    said = r"\+ activations 7.0 GiB\), free 16.0 GiB; lower --max-num-batched-tokens$"
    with pytest.raises(ConfigError, match=said):
        plan_memory(config, activation_bytes=7 * GIB, free_bytes=16 * GIB, **sizes)


@pytest.mark.parametrize("fields", [TINY, V4_FLASH], ids=["v32", "v4"])
def test_activations_grow_with_the_tokens_of_a_step(fields: dict[str, Any]) -> None:
    config, found = config_from_dict(fields), []
    for tokens, flags in ((512, {}), (2048, {}), (512, {"dtype": "float32"})):
        device = EngineConfig(max_num_batched_tokens=tokens, enforce_eager=True, **flags)
        found.append(step_bytes(device.on_device("gpu:0"), config, 8192))
    assert [one["graph_bytes"] for one in found] == [0, 0, 0]
    few, many, wide = (one["activation_bytes"] for one in found)
    assert many == 4 * few and 1.9 * few < wide <= 2 * few
    # a rank has a part of the heads and experts, and whole streams
    assert 0.3 * few < activation_bytes(config.split(2), 512, "bfloat16") < few
    # experts of longer steps run in parts
    longest = activation_bytes(config, 1 << 20, "bfloat16")
    assert longest <= 2048 * few


def test_host_memory_for_prefix_blocks_is_beside_the_caches() -> None:
    flags = {"max_num_seqs": 5, "kv_offload_bytes": "20G"}
    made = plan(100 * GIB, **flags)
    assert (made.num_blocks, made.num_host_blocks, made.free_bytes) == (50, 20 * 1024, 80 * GIB)
    assert "host memory 20480 blocks (20.0 GiB), free 80.0 GiB" in made.summary()
    # a CPU takes both from the same memory
    with pytest.raises(ConfigError, match=r"memory: needs .*free 10.0 GiB"):
        plan(30 * GIB, **flags)
    for free, size in ((10 * GIB, "20G"), (100 * GIB, BLOCK - 1)):
        with pytest.raises(ConfigError, match=r"--kv-offload-bytes: got .* a block of 1.0 MiB"):
            plan(free, kv_offload_bytes=size)


@pytest.mark.parametrize(
    ("size", "blocks", "snapshots"), [(11, 1, 1), (51, 41, 1), (52, 32, 2), (53, 33, 2)]
)
def test_host_memory_has_a_snapshot_for_every_16_blocks(
    size: int, blocks: int, snapshots: int
) -> None:
    flags = {"snapshot_bytes": 10 * BLOCK, "kv_offload_bytes": size * BLOCK + 1}
    made = plan(100 * GIB, **flags)
    assert (made.num_host_blocks, made.num_host_snapshots) == (blocks, snapshots)
    assert made.host_bytes == size * BLOCK == 100 * GIB - made.free_bytes
    assert f"host memory {blocks} blocks and {snapshots} snapshots ({size}.0 MiB)" in made.summary()
    said = "at least a block and a snapshot of 11.0 MiB"
    with pytest.raises(ConfigError, match=said):
        plan(100 * GIB, **flags | {"kv_offload_bytes": 11 * BLOCK - 1})


def test_host_memory_for_prefix_blocks_is_taken_once_for_all_ranks() -> None:
    flags = {"max_num_seqs": 5, "kv_offload_bytes": "20G", "tensor_parallel_size": 4}
    # the free memory of a rank is a fourth of the machine's
    made = plan(25 * GIB, **flags)
    assert (made.num_blocks, made.num_host_blocks, made.free_bytes) == (50, 20 * 1024, 20 * GIB)
    said = r"--kv-offload-bytes: got 20.0 GiB, .* the free host memory, 16.0 GiB"
    with pytest.raises(ConfigError, match=said):
        plan(4 * GIB, **flags)


def test_graphs_are_counted_by_their_sizes() -> None:
    config = config_from_dict(TINY)
    topk = config.index_topk
    assert graph_bytes(config, (), 10 * topk) == 0
    # where every row is short there is one graph a size
    one, two = (graph_bytes(config, (1, 8), length) for length in (topk, topk + 1))
    assert two - one == 2 * (4 << 20)
    assert graph_bytes(config, (1, 16), topk) > one
    # all graphs share the logits, so a size below the largest one costs only the driver's data
    assert graph_bytes(config, (1, 4, 8), topk) - one == 4 << 20
    # steps with prompts have more activations, and keys and values of every head
    both = graph_bytes(config, (1, 8), topk, (16, 32), 4)
    assert both - one > 2 * (4 << 20) + 4 * 24 * config.hidden_size


@pytest.mark.parametrize(("fields", "num_streams"), [(TINY, 1), (V4_FLASH, 4)], ids=["v32", "v4"])
def test_graphs_of_a_layer_that_drafts_keep_hidden_states(
    fields: dict[str, Any], num_streams: int
) -> None:
    config = config_from_dict(fields)
    plain, drafting = (
        graph_bytes(one, (1, 8), config.max_dense_keys) for one in (config, config.with_mtp_layer())
    )
    # one graph more for each of two steps, and those of further drafts of 1, 2, 4 and 8 rows
    graphs = (2 + 2 * 4) * (4 << 20)
    kept = 2 * 9 * num_streams * config.hidden_size
    # the layer has activations of its own, and all count twice
    plain_step, drafting_step = (
        activation_bytes(one, 8, "bfloat16") for one in (config, config.with_mtp_layer())
    )
    assert drafting - plain == graphs + kept + 2 * (drafting_step - plain_step)
