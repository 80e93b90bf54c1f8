"""Device time of other configurations of our kernels than the selected ones.

    python -m benchmarks.tune                     # all kernels of KERNELS
    python -m benchmarks.tune indexer_logits      # one of them

The numbers of tiles, warps and stages in `fd_dsa` come from these tables. A configuration is left
out and named if a compiler or the device refuses it, or if its result is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import torch

from benchmarks import _gpu, indexer_logits
from benchmarks import _sparse_mla_sides as sparse
from benchmarks._harness import parser_of
from benchmarks._logits_sides import Shape, config_of
from benchmarks._logits_sides import random_cache as random_keys
from benchmarks._projection_tilings import SPLIT, WHOLE
from benchmarks._torch_device import register
from fd_dsa.ops.indexer_projection import triton_kernel as projection
from fd_dsa.ops.logits.tile_configs import TileConfig
from fd_dsa.ops.mla.tensor_core import KernelConfig, kernel_config, num_splits
from fd_dsa.ops.split_sums import new_scratch

CHOSEN = "chosen"
Both: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# DeepSeek-V3.2: hidden size, width of an index key, index heads
_HIDDEN, _KEYS, _HEADS = 7168, 128, 64
# name, calls by configuration, the selected configuration ("" = several or none)
Case: TypeAlias = tuple[str, Mapping[str, Sequence[_gpu.Call]], str]


@cache
def _scratch() -> torch.Tensor:
    return new_scratch(torch.empty(0, device="cuda"))


def _launch(x: torch.Tensor, both: Both, tiling: projection.Tiling) -> tuple[_gpu.Call, Both]:
    """Bind a launch of the indexer's projections.

    Returns:
        The call and its outputs: index keys and head weights.
    """
    keys = torch.empty(len(x), _KEYS, device="cuda", dtype=torch.bfloat16)
    out = keys, torch.empty(len(x), _HEADS, device="cuda")
    scratch = _scratch() if tiling in SPLIT else None
    arguments = projection.kernel_arguments(x, *both, out, scratch)
    grid, options = projection.launch_options(arguments, tiling)
    return projection.project_indexer_kernel.bind(grid, **arguments, **options), out


def _hidden_states(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, _HIDDEN, device="cuda", dtype=torch.bfloat16)


def _projections(count: int) -> list[Both]:
    """Make `count` pairs of random weights, each pair in one matrix."""
    shape, widths = (count, _HIDDEN, _KEYS + _HEADS), (_KEYS, _HEADS)
    return [w.split(widths, 1) for w in torch.randn(shape, device="cuda", dtype=torch.bfloat16)]


def tune_projections() -> Iterator[Case]:
    """Yield the tilings of `project_indexer`: all of them around the limit of split sums."""
    limit = projection.MAX_SPLIT_TOKENS
    copies = _projections(_gpu.num_sets(2 * _HIDDEN * (_KEYS + _HEADS)))
    for tokens in (1, 16, 32, 64, 128, 256, 512, 1024, 2048):
        x, tried = _hidden_states(tokens), (*SPLIT, *WHOLE) if tokens <= 2 * limit else WHOLE
        sides = {
            str(tiling): [_launch(x, both, tiling)[0] for both in copies]
            for tiling in (SPLIT if tokens < limit else tried)
        }
        yield f"{tokens} tokens", sides, str(projection.configuration(tokens))


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Return the projections of decode steps and of a prompt's chunk."""
    (both,), found = _projections(1), {}
    for tokens in (1, 128, 1024):
        call, out = _launch(_hidden_states(tokens), both, projection.configuration(tokens))
        found[f"projections, {tokens} tokens"] = call, list(out)
    return found


# registers of a thread -> blocks of four warps that a processor then has
_BLOCKS = {255: 2, 168: 3, 128: 4, 96: 5}


def tile_configs(shape: Shape) -> dict[str, TileConfig]:
    """Return the selected configuration of a shape, and others that differ in one thing."""
    chosen = config_of(shape)
    configs = {CHOSEN: chosen}
    for registers, blocks in _BLOCKS.items():
        config = replace(chosen, maxnreg=registers, programs_per_processor=blocks)
        configs[f"{registers} registers"] = config
    configs |= {f"{n} stages": replace(chosen, num_stages=n) for n in (2, 4, 5)}
    configs |= {f"{n} pages to begin": replace(chosen, begin_pages=n) for n in (0, 1, 3, 4)}
    configs |= {f"{n} programs": replace(chosen, programs_per_processor=n) for n in (1, 2, 8)}
    first, half = chosen.first_tokens, max(chosen.first_tokens // 2, 1)
    for tokens in ((first, 0), (first, first), (2 * first, 0), (half, half)):
        for registers in (255, 168):
            config = TileConfig(
                *tokens, maxnreg=registers, programs_per_processor=_BLOCKS[registers]
            )
            configs[f"{tokens[0]} + {tokens[1]} tokens, {registers} registers"] = config
    names = {config: label for label, config in reversed(configs.items())}
    return {label: config for label, config in configs.items() if names[config] == label}


def tune_indexer_logits() -> Iterator[Case]:
    """Yield configurations of the indexer's tile kernel: tokens, registers and pages in flight."""
    chosen = [Shape(h, 1, keys << 10, 2048, True) for h in (64, 32) for keys in (8, 32)]
    chosen += [Shape(64, 1, 8 << 10, 8192, True), Shape(64, 64, 4 << 10, 4)]
    chosen += [Shape(64, 1, 4 << 10), Shape(64, 1, 128 << 10), Shape(64, 32, 4 << 10)]
    chosen += [Shape(64, 64, 32 << 10, new) for new in (1, 2, 3, 4)] + [Shape(32, 64, 32 << 10)]
    cache, logits = random_keys(), indexer_logits.scores_for(chosen)
    for shape in chosen:
        steps = indexer_logits.steps_of(shape, cache, logits)
        sides = {
            label: [step.ours(config) for step in steps]
            for label, config in tile_configs(shape).items()
        }
        right = _right(shape.label, sides, steps[0], steps[0].logits, indexer_logits.TOLERANCE)
        yield shape.label, right, CHOSEN


_CONFIGS = (
    *(KernelConfig(False, h, 64, True, 4, 1, 2) for h in (8, 16, 32)),
    *(KernelConfig(False, h, 128, True, 8, 1, 1) for h in (8, 16, 32)),
    *(KernelConfig(False, h, 64, True, 8, 1, 1) for h in (16, 32)),
    *(KernelConfig(False, 16, n, False, 4, 1, p) for n, p in ((32, 2), (64, 1))),
    *(KernelConfig(False, 64, n, False, 8, 1, 1) for n in (32, 64)),
    *(KernelConfig(True, h, 64, True, 4, 2, 1) for h in (16, 32)),
    *(KernelConfig(True, h, 128, True, 8, 1, 1) for h in (16, 32)),
    *(
        KernelConfig(True, 16, n, False, 4, s, p)
        for n, s, p in ((64, 2, 2), (32, 3, 2), (32, 2, 4))
    ),
    *(KernelConfig(True, 64, n, False, 8, s, 1) for n, s in ((64, 2), (32, 3))),
)


def _sparse_mla_sides(
    ours: sparse.Ours, sets: list[sparse.Inputs], heads: int, tokens: int
) -> Iterator[tuple[str, list[_gpu.Call]]]:
    """Yield calls of the selected configuration, of other ones, and of other splits."""
    fp8, rows = sets[0].fp8, len(ours.partials.lse)
    chosen = kernel_config(heads, tokens, fp8)
    yield CHOSEN, [ours.call(s, chosen) for s in sets]
    for config in _CONFIGS:
        fits = min(heads, 16) <= config.block_h < max(2 * heads, 17)
        if config != chosen and fits and not (fp8 and config.copied):
            yield "/".join(str(int(x)) for x in config), [ours.call(s, config) for s in sets]
    splits_now = num_splits(tokens, heads, sparse.TOPK, chosen, rows)
    for splits in (1, 2, 3, 4, 6, 8, 12, 16, 32):
        if splits != splits_now and splits * tokens * heads <= 4 * rows:
            yield f"{splits} splits", [ours.call(s, chosen, splits) for s in sets]


def tune_sparse_mla() -> Iterator[Case]:
    """Yield configurations of the sparse MLA kernels and numbers of splits."""
    records = sparse.record_cache(1 << 20)
    width = sparse.RANK + sparse.ROPE
    latents = torch.randn(1 << 20, width, device="cuda", dtype=torch.bfloat16)
    for heads, tokens in ((h, t) for h in (8, 16, 32, 64, 128) for t in (1, 8, 32, 64, 128, 1024)):
        for rows in (records, latents):
            count = min(8, _gpu.num_sets(tokens * sparse.TOPK * rows[0].nbytes))
            slots = [sparse.random_slots(tokens, len(rows)) for _ in range(count)]
            sets = [sparse.Inputs(rows, s, heads) for s in slots]
            ours = sparse.Ours(tokens, heads)
            sides = dict(_sparse_mla_sides(ours, sets, heads, tokens))
            name = f"{heads} heads, {tokens} tokens, {'FP8' if sets[0].fp8 else 'bf16'}"
            yield name, _right(name, sides, sets[0], ours.out, 1e-2), CHOSEN


def _right(
    case: str, sides: Mapping[str, Sequence[_gpu.Call]], inputs: Any, out: Any, most: float
) -> Mapping[str, Sequence[_gpu.Call]]:
    """Return the configurations that run and have an error of at most `most`."""

    def error(label: str) -> float:
        _gpu.poison(out)
        sides[label][0]()
        return inputs.error(out)

    return _gpu.checked(case, sides, error, most)[0]


KERNELS: dict[str, Callable[[], Iterator[Case]]] = {
    "projections": tune_projections,
    "indexer_logits": tune_indexer_logits,
    "sparse_mla": tune_sparse_mla,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times of all configurations of the named kernels. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS))
    kernels = parser.parse_args(argv).kernels
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(KERNELS)}")
    register()
    for kernel in kernels or KERNELS:
        for name, sides, chosen in KERNELS[kernel]():
            times = _gpu.interleaved(dict(sides), rounds=10) if sides else {}
            us = {label: time["p50"] for label, time in times.items()}
            best = sorted(us, key=us.__getitem__)[:3]
            line = "  ".join(f"{label}: {value:.2f}" for label, value in us.items())
            print(f"{kernel}, {name}: best {best}, serves {chosen or '-'}:  {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
