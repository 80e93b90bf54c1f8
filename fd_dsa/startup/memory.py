"""Memory plan: bytes of weights, graphs and caches, and the number of cache blocks that fit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fd_dsa.config import EngineConfig
from fd_dsa.errors import ConfigError
from fd_dsa.models.dequantize import BLOCK, num_blocks
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.four_bits import FourBits
from fd_dsa.models.registry import FamilyConfig
from fd_dsa.startup.host_memory import available_memory_bytes

_DEFAULT_CACHE_BYTES = 4 << 30
_BLOCKS_PER_SNAPSHOT = 16
"""Blocks in host memory for each snapshot, of models with snapshots. A conversation needs one."""
WIDTHS = {"float32": 4, "bfloat16": 2}
# parts of a model by the names of their tensors; the first pattern that fits counts
_PARTS = {
    "routed experts": re.compile(r"\.experts\."),
    "shared experts": re.compile(r"\.shared_experts\."),
    "dense MLPs": re.compile(r"\.mlp\.\w+_proj\."),
    "attention by heads": re.compile(r"\.(q_b|kv_b|o)_proj\.weight$|\.attn\.w(q_b|o_a|o_b)\."),
    "head": re.compile(r"\bhead\.weight$|^lm_head\."),
    "embedding": re.compile(r"embed_tokens\."),
}
_OTHERS = "indexers, routers, others"
# matrices with 4 bytes a value on every device
_WIDE = re.compile(r"hc_\w*fn$|\.ape$|\.tid2eid$")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of an engine's memory, made before anything large is allocated.

    Attributes:
        weight_bytes: bytes of the weights as held.
        graph_bytes: bytes of captured steps with their activations, 0 without captures.
        activation_bytes: bytes of the activations of the largest eager step, 0 on a CPU.
        state_bytes: bytes of the states that batch rows have in addition to blocks.
        free_bytes: free bytes of the system when the plan was made; on a CPU without those of the
            host blocks.
        bytes_per_block: bytes of one cache block over all layers.
        num_blocks: number of cache blocks.
        block_size: tokens of a block.
        max_model_len: longest prompt plus output, tokens.
        num_host_blocks: number of prefix blocks in host memory in addition, on all ranks together.
        snapshot_bytes: bytes of a snapshot of a row.
        num_host_snapshots: number of such snapshots in host memory, on all ranks together.
    """

    weight_bytes: int
    graph_bytes: int
    activation_bytes: int
    state_bytes: int
    free_bytes: int
    bytes_per_block: int
    num_blocks: int
    block_size: int
    max_model_len: int
    num_host_blocks: int = 0
    snapshot_bytes: int = 0
    num_host_snapshots: int = 0

    @property
    def host_bytes(self) -> int:
        """Bytes of the prefix blocks and snapshots in host memory."""
        of_snapshots = self.num_host_snapshots * self.snapshot_bytes
        return self.num_host_blocks * self.bytes_per_block + of_snapshots

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of all cache blocks of all layers."""
        return self.num_blocks * self.bytes_per_block

    @property
    def others(self) -> list[tuple[str, int]]:
        """Name and bytes of each part apart from weights and blocks, if it has any."""
        sizes = {
            "graphs": self.graph_bytes,
            "activations": self.activation_bytes,
            "states": self.state_bytes,
        }
        return [(name, size) for name, size in sizes.items() if size]

    def summary(self) -> str:
        """Describe the plan in one line."""
        blocks_per_request = -(-self.max_model_len // self.block_size)
        others = "".join(f"{name} {format_bytes(size)}, " for name, size in self.others)
        snapshots = f" and {self.num_host_snapshots} snapshots" if self.num_host_snapshots else ""
        host = f"host memory {self.num_host_blocks} blocks{snapshots} "
        host = f"{host}({format_bytes(self.host_bytes)}), " if self.num_host_blocks else ""
        return (
            f"weights {format_bytes(self.weight_bytes)}, kv cache {self.num_blocks} blocks x "
            f"{self.block_size} = {self.num_blocks * self.block_size} tokens "
            f"({format_bytes(self.kv_cache_bytes)}, "
            f"{self.num_blocks // blocks_per_request} full-length requests), "
            f"{others}{host}free {format_bytes(self.free_bytes)}"
        )


def format_bytes(num_bytes: float) -> str:
    """Write a size for people, such as `31.2 GiB`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def weight_bytes(
    config: FamilyConfig,
    dtype: str = "float32",
    fp8: frozenset[str] = frozenset(),
    four_bits: FourBits | None = None,
) -> int:
    """Return the bytes of a model's weights as held. Arguments are those of `weight_parts`."""
    return sum(weight_parts(config, dtype, fp8, four_bits).values())


def weight_parts(
    config: FamilyConfig,
    dtype: str = "float32",
    fp8: frozenset[str] = frozenset(),
    four_bits: FourBits | None = None,
) -> dict[str, int]:
    """Return the bytes of a model's weights as held, by part of the model.

    Args:
        config: configuration of the model, or of one rank's part.
        dtype: type of most matrices that are not in `fp8`; vectors are float32. A CPU holds
            everything in float32.
        fp8: names of tensors whose values are one byte, with a scale for each block.
        four_bits: experts in four bits; None = there are none.
    """
    width, parts = WIDTHS[dtype], dict.fromkeys((*_PARTS, _OTHERS), 0)
    for name, tensor in expected_tensors(config).items():
        if len(tensor.shape) == 1 or _WIDE.search(name):
            size = 4 * tensor.num_elements
        elif name in fp8:
            blocks = num_blocks(tensor.shape, (BLOCK, BLOCK))
            size = tensor.num_elements + 4 * math.prod(blocks)
        elif four_bits is not None and name in four_bits.names:
            size = four_bits.num_bytes(tensor.shape)
        else:
            size = width * tensor.num_elements
        parts[next((p for p, names in _PARTS.items() if names.search(name)), _OTHERS)] += size
    return parts


def whole_heads_bytes(config: FamilyConfig, dtype: str, ranks: int) -> int:
    """Return the bytes of other ranks' heads that a rank holds to exchange heads for tokens.

    Args:
        config: configuration of one rank's part.
        dtype: type of the up-projections of keys and values.
    """
    own = (x for name, x in expected_tensors(config).items() if name.endswith("kv_b_proj.weight"))
    return (ranks - 1) * WIDTHS[dtype] * sum(tensor.num_elements for tensor in own)


def plan_memory(
    config: EngineConfig,
    *,
    weight_bytes: int,
    bytes_per_block: int,
    max_model_len: int,
    graph_bytes: int = 0,
    activation_bytes: int = 0,
    state_bytes: int = 0,
    snapshot_bytes: int = 0,
    free_bytes: int | None = None,
    takes_all: bool = False,
) -> MemoryPlan:
    """Plan the memory of weights and caches.

    The flags `num_gpu_blocks_override` and `kv_cache_memory_bytes` decide the number of blocks.
    Without them there are enough for `max_num_seqs` sequences of full length, if the memory that
    weights and graphs leave holds as many. Unless `takes_all`, blocks take at most half of that
    memory, and at most 4 GiB or one sequence of full length. `kv_offload_bytes` is host memory in
    addition, in equal parts on all ranks. A CPU takes it from the same memory. With snapshots it
    has one of them for every 16 blocks.

    Args:
        weight_bytes, bytes_per_block, max_model_len: as in MemoryPlan.
        graph_bytes, activation_bytes, state_bytes, snapshot_bytes: as in MemoryPlan.
        free_bytes: memory of a rank for weights, graphs and caches together; None = ask the
            system.
        takes_all: True if no other process needs the memory.

    Raises:
        ConfigError: weights and caches do not fit in the free memory, or the caches do not hold
            one sequence of full length. Also if host blocks do not fit in free host memory.
    """
    num_ranks = config.tensor_parallel_size
    if free_bytes is None:
        free_bytes = available_memory_bytes()
    free_on_host = None if takes_all else free_bytes * num_ranks
    in_host = _host_counts(config, bytes_per_block, snapshot_bytes, free_on_host)
    num_host_blocks, num_host_snapshots = in_host
    if not takes_all:
        host_bytes = num_host_blocks * bytes_per_block + num_host_snapshots * snapshot_bytes
        free_bytes -= -(-host_bytes // num_ranks)
    needed_blocks = -(-max_model_len // config.tokens_per_block)
    # None = no flag sets the size of the caches
    flag = None
    if config.num_gpu_blocks_override is not None:
        flag, num_blocks = "--num-gpu-blocks-override", config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes is not None:
        flag = "--kv-cache-memory-bytes"
        num_blocks = int(config.kv_cache_memory_bytes) // bytes_per_block
    else:
        others = graph_bytes + activation_bytes + state_bytes
        room = max(free_bytes - weight_bytes - others, 0)
        if not takes_all:
            room = min(room // 2, max(_DEFAULT_CACHE_BYTES, needed_blocks * bytes_per_block))
        num_blocks = min(config.num_seqs * needed_blocks, room // bytes_per_block)
    plan = MemoryPlan(
        weight_bytes=weight_bytes,
        graph_bytes=graph_bytes,
        activation_bytes=activation_bytes,
        state_bytes=state_bytes,
        free_bytes=free_bytes,
        bytes_per_block=bytes_per_block,
        num_blocks=num_blocks,
        block_size=config.tokens_per_block,
        max_model_len=max_model_len,
        num_host_blocks=num_host_blocks,
        snapshot_bytes=snapshot_bytes,
        num_host_snapshots=num_host_snapshots,
    )
    _check_fit(plan, num_blocks if flag else max(num_blocks, needed_blocks), flag)
    if num_blocks < needed_blocks:
        raise ConfigError(
            f"memory: {num_blocks} cache blocks of {config.tokens_per_block} tokens "
            f"({format_bytes(plan.kv_cache_bytes)}) do not hold one sequence of "
            f"max_model_len {max_model_len}, which takes {needed_blocks} blocks "
            f"({format_bytes(needed_blocks * bytes_per_block)}); lower --max-model-len or raise "
            f"{flag or '--kv-cache-memory-bytes'}"
        )
    return plan


def _host_counts(
    config: EngineConfig, bytes_per_block: int, snapshot_bytes: int, free_bytes: int | None
) -> tuple[int, int]:
    """Return the numbers of prefix blocks and snapshots in host memory.

    Both are 0 without `kv_offload_bytes`.

    Args:
        free_bytes: free host memory; None = ask the system.
    """
    wanted = int(config.kv_offload_bytes)
    if not wanted:
        return 0, 0
    free = available_memory_bytes() if free_bytes is None else free_bytes
    least, parts = bytes_per_block + snapshot_bytes, "a block"
    if snapshot_bytes:
        parts += " and a snapshot"
    if not least <= wanted <= free:
        raise ConfigError(
            f"--kv-offload-bytes: got {format_bytes(wanted)}, allowed: at least {parts} of "
            f"{format_bytes(least)}, and at most the free host memory, {format_bytes(free)}"
        )
    num_snapshots = 0
    if snapshot_bytes:
        num_snapshots = wanted // (_BLOCKS_PER_SNAPSHOT * bytes_per_block + snapshot_bytes) or 1
    return (wanted - num_snapshots * snapshot_bytes) // bytes_per_block, num_snapshots


def _check_fit(plan: MemoryPlan, least_blocks: int, flag: str | None) -> None:
    """Refuse a plan that does not fit with `least_blocks` cache blocks."""
    kv_cache_bytes = least_blocks * plan.bytes_per_block
    others = sum(size for _, size in plan.others)
    needed = plan.weight_bytes + kv_cache_bytes + others
    if needed <= plan.free_bytes:
        return
    advice = f"lower {flag or '--max-model-len'}"
    if plan.weight_bytes >= plan.free_bytes:
        advice = "the weights alone do not fit: take a smaller model or a larger machine"
    elif needed - plan.graph_bytes <= plan.free_bytes:
        advice = "give fewer or smaller --cudagraph-capture-sizes, or take --enforce-eager"
    elif needed - plan.activation_bytes <= plan.free_bytes:
        advice = "lower --max-num-batched-tokens"
    elif needed - plan.state_bytes <= plan.free_bytes:
        advice = "lower --max-num-seqs"
    also = "".join(f" + {name} {format_bytes(size)}" for name, size in plan.others)
    raise ConfigError(
        f"memory: needs {format_bytes(needed)} (weights {format_bytes(plan.weight_bytes)} + kv "
        f"cache {format_bytes(kv_cache_bytes)}{also}), free {format_bytes(plan.free_bytes)}; "
        f"{advice}"
    )
