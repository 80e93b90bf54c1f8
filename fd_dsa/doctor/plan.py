"""`fd-dsa doctor --plan FOLDER -tp N`: a model's memory on each GPU.

The sizes are those of the engine's memory plan with default flags, but for the block size that
DeepSeek-V4 needs. No GPU is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_dsa.cache_formats import CACHE_FORMATS
from fd_dsa.config import EngineConfig
from fd_dsa.environment import exchanged_min_tokens
from fd_dsa.errors import ConfigError

if TYPE_CHECKING:
    from fd_dsa.models.checkpoint import Checkpoint
    from fd_dsa.models.registry import FamilyConfig

GPU_GIB = (80, 96, 141, 180, 288)
"""Memory of H100 (80), H20 and GH200 (96), H200 (141), B200 (180) and B300 (288).

A GPU has about as many GiB as its GB number.
"""
_CACHES = tuple(name for name in CACHE_FORMATS if name != "float32")
# Hopper's compute capability, multiprocessors and bytes of shared memory
_TRAITS = 90, 132, 227 << 10


def plan(folder: str | Path, ranks: int, *, allow_unknown: bool = False) -> dict[str, Any]:
    """Return the memory of a model on each GPU, and the cached tokens on common GPUs.

    Args:
        folder: with config.json. Without weights, the types of weights follow config.json's
            quantisation.
        ranks: number of GPUs that share the model.
        allow_unknown: accept fields of config.json that fd_dsa does not know.

    Returns:
        `model`, `unknown_fields` (of config.json, ignored), `layers`, `ranks`, `utilization`,
        `max_model_len`, `max_num_seqs`, `block_size`, `has_weights`, `parts` and `caches`. `parts`
        has the bytes of weights on each GPU, by part of the model. For each cache dtype of the
        model `caches` has `bytes_per_token`, `state_bytes` (of rows and snapshots), `graph_bytes`,
        `activation_bytes`, `workspace_bytes` and `gpus`. `gpus` has `tokens` and `why_not` by
        memory in GiB. If the model does not fit, `tokens` is 0 and `why_not` the reason.

    Raises:
        ConfigError: an invalid flag, config.json or checkpoint, or a model that cannot be split.
    """
    from fd_dsa.engine.caches import caches_class
    from fd_dsa.models.four_bit_experts import four_bit_experts
    from fd_dsa.models.loader import fp8_tensors, with_whole_blocks
    from fd_dsa.models.registry import open_checkpoint, read_config
    from fd_dsa.startup.memory import weight_parts, whole_heads_bytes

    given = EngineConfig(model=folder, tensor_parallel_size=ranks)
    folder = Path(folder)
    whole = read_config(folder, allow_unknown=allow_unknown)
    first, *_ = configs = _settings(given, whole)
    caches_class(whole).check_flags(first, whole)
    opened: AbstractContextManager[Checkpoint | None] = nullcontext()
    if has_weights := any(folder.glob("*.safetensors")):
        opened = open_checkpoint(whole, folder)
    with opened as checkpoint:
        fp8 = with_whole_blocks(whole, ranks, fp8_tensors(checkpoint, whole))
        four_bits = four_bit_experts(checkpoint, whole, ranks)
    model = whole.split(ranks)
    parts = weight_parts(model, first.dtype, fp8, four_bits)
    if exchanged_min_tokens():
        parts["heads of other ranks"] = whole_heads_bytes(model, first.dtype, ranks)
    return {
        "model": str(folder),
        "unknown_fields": list(whole.unknown_fields),
        "layers": model.num_hidden_layers,
        "ranks": ranks,
        "utilization": first.gpu_memory_utilization,
        "max_model_len": model.max_position_embeddings,
        "max_num_seqs": first.num_seqs,
        "block_size": first.tokens_per_block,
        "has_weights": has_weights,
        "parts": parts,
        "caches": {one.kv_cache_dtype: _caches(one, model, sum(parts.values())) for one in configs},
    }


def _settings(given: EngineConfig, model: FamilyConfig) -> list[EngineConfig]:
    """Return the settings on a GPU, one for each cache dtype of the model."""
    given = given.with_blocks(model.default_block_size)
    return [replace(given, kv_cache_dtype=kind).on_device("gpu:0") for kind in _CACHES]


def _caches(config: EngineConfig, model: FamilyConfig, weight_bytes: int) -> dict[str, Any]:
    """Return the memory other than weights for one cache dtype, and the fit on each GPU."""
    from fd_dsa.engine.caches import caches_class
    from fd_dsa.startup.graph_sizes import step_bytes
    from fd_dsa.startup.memory import plan_memory
    from fd_dsa.startup.plan import cache_sizes, new_batch, workspace_bytes
    from fd_dsa.triton_runtime.driver import GpuTraits

    longest = model.max_position_embeddings
    caches_class(model).check_flags(config, model)
    caches = caches_class(model)(config, model, new_batch(config, longest))
    workspace = workspace_bytes(config, model, caches, GpuTraits(*_TRAITS))
    of_steps = step_bytes(config, model, longest)
    sizes = {"weight_bytes": weight_bytes, **cache_sizes(caches, longest), **of_steps}
    gpus = {}
    for gib in GPU_GIB:
        free, tokens, reason = int(config.gpu_memory_utilization * (gib << 30)), 0, ""
        try:
            memory = plan_memory(config, **sizes, free_bytes=free - workspace, takes_all=True)
            tokens = memory.num_blocks * memory.block_size
        except ConfigError as error:
            reason = str(error)
        gpus[gib] = {"tokens": tokens, "why_not": reason}
    return {
        "bytes_per_token": caches.bytes_per_block // config.tokens_per_block,
        "state_bytes": caches.state_bytes,
        **of_steps,
        "workspace_bytes": workspace,
        "gpus": gpus,
    }


def as_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the plan as lines for the terminal."""
    kinds = found["caches"]
    first = next(iter(kinds.values()))
    source = "its weights" if found["has_weights"] else "config.json only"
    yield f"{found['model']}: {found['layers']} layers, by {source}"
    if found["unknown_fields"]:
        yield f"unknown fields of config.json, ignored: {', '.join(found['unknown_fields'])}"
    yield f"on each of {found['ranks']} GPUs, GiB:"
    sizes = found["parts"] | {"weights in all": sum(found["parts"].values())}
    sizes |= {"graphs, at most": first["graph_bytes"]}
    sizes |= {"activations, at most": first["activation_bytes"]}
    sizes |= {"work memory": first["workspace_bytes"]}
    states = f"states of {found['max_num_seqs']} rows in"
    sizes |= {f"{states} {kind}": one["state_bytes"] for kind, one in kinds.items()}
    shown = {part: size for part, size in sizes.items() if size}
    width = max(25, *map(len, shown))
    yield from (f"  {part:<{width}} {size / 2**30:7.2f}" for part, size in shown.items())
    each = (f"{one['bytes_per_token'] / 1024:.1f} in {kind}" for kind, one in kinds.items())
    yield f"caches of a token, KiB: {', '.join(each)}"
    yield (
        f"tokens that the caches hold, in {found['utilization']:.0%} of a GPU's memory; "
        f"a request of max_model_len has {found['max_model_len']:,}:"
    )
    for gib in first["gpus"]:
        gpus = {kind: one["gpus"][gib] for kind, one in kinds.items()}
        fits = [f"{gpu['tokens']:,} in {kind}" for kind, gpu in gpus.items() if gpu["tokens"]]
        # the last cache dtype is the smallest
        fits = fits or [f"no: {[*gpus.values()][-1]['why_not'].rpartition('; ')[2]}"]
        yield f"  {gib:>4} GB  {', '.join(fits)}"
