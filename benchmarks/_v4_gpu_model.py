"""The model and cases of `v4_gpu`, and the least that a case can take."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._gpu_engine_model import (
    BF16_PER_S,
    BYTES_PER_S,
    FP8_PER_S,
    Case,
    worker_options,
)
from tests.models.published import V4_FLASH

WIDTHS: dict[str, Any] = V4_FLASH
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "vocab_size": 4096,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 32,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 16,
    "max_position_embeddings": 4096,
    "hc_sinkhorn_iters": 2,
    "expert_dtype": None,
    "quantization_config": None,
    "rope_scaling": None,
}
"""Widths of a dry run."""
KINDS = {0: "window", 4: "CSA", 128: "HCA"}
"""Tokens of an entry -> kind of a layer."""
# bytes of a key and of an indexer's key in FP8
_KEY, _INDEX_KEY = 584, 132


class V4Shape(NamedTuple):
    """Layers of V4-Flash, from the first on, experts of a layer, and GPUs that share them."""

    layers: int = 43
    experts: int = 128
    ranks: int = 1

    @property
    def ratios(self) -> list[int]:
        """Tokens of an entry of each layer, 0 in one without entries."""
        ratios: list[int] = WIDTHS["compress_ratios"][: self.layers]
        return ratios

    @property
    def kinds(self) -> list[str]:
        """Kind of each layer."""
        return [KINDS[ratio] for ratio in self.ratios]

    def even_hits(self, rows: int) -> float:
        """Return the experts of a layer that a decode step hits if routing is even."""
        share = WIDTHS["num_experts_per_tok"] / self.experts
        return float(self.experts * (1 - (1 - share) ** rows))


CASES = {
    "decode-1x4k": Case("V33", "decode", 1, 4096, 128, 3),
    "decode-8x4k": Case("V33", "decode", 8, 4096, 128),
    "prefill-1x8k": Case("V34", "prefill", 1, 8192, 1),
    "prefill-4x2k": Case("V34", "prefill", 4, 2048, 1),
    "decode-1x32k": Case("V33", "decode", 1, 32768, 128),
    "prefill-8x4k": Case("V34", "prefill", 8, 4096, 1),
    "prefill-1x32k": Case("V34", "prefill", 1, 32768, 1),
    "decode-32x4k": Case("V33", "decode", 32, 4096, 128, 1),
    "mixed-64x2k": Case("V35", "mixed", 64, 2048, 128, 1),
    "decode-1x128k": Case("V33", "decode", 1, 131072, 64, 1),
    "decode-128x4k": Case("V33", "decode", 128, 4096, 64, 1),
    "decode-32x32k": Case("V33", "decode", 32, 32768, 64, 1),
}
"""In the order of a run, which the long prompts end."""


def of_dry_run(case: Case) -> Case:
    """Return a case that a CPU can run."""
    prompt = case.prompt // 64
    return case._replace(batch=min(case.batch, 2), prompt=prompt, new=min(case.new, 12), runs=1)


def v4_shape_of(ranks: int, layers: int | None, experts: int | None) -> V4Shape:
    """Return V4-Flash with half of its experts on one GPU, and with all on several, or cut."""
    whole = V4Shape() if ranks == 1 else V4Shape(43, WIDTHS["n_routed_experts"], ranks)
    return whole._replace(layers=layers or whole.layers, experts=experts or whole.experts)


def fields_of(shape: V4Shape, is_dry: bool = False) -> dict[str, Any]:
    """Return config.json: V4-Flash in FP8 with FP4 experts, or small widths of a dry run."""
    sizes = {"num_hidden_layers": shape.layers, "n_routed_experts": shape.experts}
    return WIDTHS | sizes | (SMALL if is_dry else {})


@contextlib.contextmanager
def v4_options(
    args: argparse.Namespace, shape: V4Shape, config: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the options of a worker's engine, see `engine_options`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(fields_of(shape, args.dry)))
        yield worker_options(args, folder, config)


def _fp8(out_width: int, in_width: int) -> int:
    """Return the bytes of a matrix in FP8, with a byte for the scale of 128 x 128."""
    return out_width * in_width + ceil(out_width / 128) * ceil(in_width / 128)


def _fp4(out_width: int, in_width: int) -> float:
    """Return the bytes of a matrix in FP4, with a byte for the scale of 32 values of a row."""
    return out_width * in_width * (1 / 2 + 1 / 32)


def floor(case: Case, shape: V4Shape) -> float | None:
    """Return the shortest time of a case in its unit, or None for a mixed load.

    Decode: weights as in the file, of the experts only those that even routing hits; keys in FP8,
    sources of entries in float32; and residual streams. Prefill: GEMMs and attention.
    """
    if case.kind == "decode":
        return 1e3 * decode_bytes(shape, case.batch, case.prompt) / BYTES_PER_S
    if case.kind == "mixed":
        return None
    fp8, bf16 = prompt_flops(shape, case.prompt)
    return case.prompt / (fp8 / FP8_PER_S + bf16 / BF16_PER_S)


def drafted_bytes(shape: V4Shape, rows: int, context: int, has_layer: bool) -> float:
    """Return the bytes of a decode step with a draft a row, over those of a step without.

    Args:
        context: tokens of each row.
        has_layer: True if the layer for multi-token prediction makes the drafts. It has a window,
            experts and two projections, and reads the head once more.
    """
    plain, hidden = decode_bytes(shape, rows, context), WIDTHS["hidden_size"]
    found = decode_bytes(shape, rows, context, 2)
    if has_layer:
        layer = shape._replace(layers=1)
        found += decode_bytes(layer, rows, context, 2) + 2 * _fp8(hidden, hidden)
    return found / plain


def decode_bytes(shape: V4Shape, rows: int, context: int, num_new: int = 1) -> float:
    """Return the bytes that a GPU reads and writes in a decode step.

    GPUs share experts, heads and the output head, and have all else whole.

    Args:
        context: tokens of each row.
        num_new: tokens of a row in the step.
    """
    w = WIDTHS
    hidden, width = w["hidden_size"], w["moe_intermediate_size"] // shape.ranks
    hits = shape.even_hits(num_new * rows)
    experts = hits * (2 * _fp4(width, hidden) + _fp4(hidden, width))
    shared = 2 * _fp8(width, hidden) + _fp8(hidden, width)
    layer = experts + shared + _layer_bytes(shape)
    # read and written around both blocks, which read and write a stream
    layer += num_new * rows * 2 * 2 * 2 * (w["hc_mult"] + 1) * hidden
    head = 2 * w["vocab_size"] * hidden / shape.ranks
    entries = sum(_entry_bytes(ratio) + rows * _row_bytes(ratio, context) for ratio in shape.ratios)
    return shape.layers * layer + entries + head


def _layer_bytes(shape: V4Shape) -> float:
    """Return the bytes of what every layer has: projections, router, connections, norms."""
    w = WIDTHS
    hidden, rank, streams = w["hidden_size"], w["q_lora_rank"], w["hc_mult"]
    heads = w["num_attention_heads"] * w["head_dim"] // shape.ranks
    groups = w["o_groups"] // shape.ranks
    low = groups * w["o_lora_rank"]
    projections = _fp8(rank, hidden) + _fp8(w["head_dim"], hidden) + _fp8(heads, rank)
    projections += _fp8(low, heads // groups) + _fp8(hidden, low)
    mixes = (2 + streams) * streams
    connections = 2 * (4 * mixes * streams * hidden + 4 * mixes + 12)
    norms = 2 * (2 * hidden + rank + w["head_dim"]) + 4 * w["num_attention_heads"]
    return projections + 2 * shape.experts * hidden + connections + norms


def _entry_bytes(ratio: int) -> float:
    """Return the bytes of the weights of a layer's compressors and indexer."""
    if not ratio:
        return 0
    w, halves = WIDTHS, 2 if ratio == 4 else 1
    hidden, widths = w["hidden_size"], [w["head_dim"]]
    index = 0
    if ratio == 4:
        widths.append(w["index_head_dim"])
        index = _fp8(w["index_n_heads"] * w["index_head_dim"], w["q_lora_rank"])
        index += 2 * w["index_n_heads"] * hidden
    # projections to values and gates, what is added to the gates, and the norm
    return index + sum(
        2 * 2 * halves * width * hidden + 4 * ratio * halves * width + 2 * width for width in widths
    )


def _row_bytes(ratio: int, context: int) -> float:
    """Return the bytes of a row's keys and sources in a layer."""
    w = WIDTHS
    keys = min(context, w["sliding_window"])
    if not ratio:
        return keys * _KEY
    halves, width, entries = 1, w["head_dim"], context // ratio
    index = 0
    if ratio == 4:
        halves, width = 2, width + w["index_head_dim"]
        index = entries * _INDEX_KEY if entries > w["index_topk"] else 0
        entries = min(entries, w["index_topk"])
    # values and gates: a source is written, and as much is read of the sources of an entry
    sources = 2 * 2 * halves * width * 4
    return (keys + entries) * _KEY + index + sources


def prompt_flops(shape: V4Shape, tokens: int) -> tuple[float, float]:
    """Return the operations of a GPU for a prompt, in FP8 and in bfloat16."""
    w = WIDTHS
    hidden, rank, width = w["hidden_size"], w["q_lora_rank"], w["head_dim"]
    heads, low = w["num_attention_heads"] * width // shape.ranks, w["o_lora_rank"]
    mixes = (2 + w["hc_mult"]) * w["hc_mult"]
    experts = (w["num_experts_per_tok"] + w["n_shared_experts"]) * 3 * w["moe_intermediate_size"]
    layer = hidden * (experts + w["o_groups"] * low) // shape.ranks + heads * (rank + low)
    fp8 = shape.layers * (layer + (rank + width) * hidden)
    bf16 = float(shape.layers * hidden * (shape.experts + 2 * mixes * w["hc_mult"]))
    seen = np.arange(1, tokens + 1)
    for ratio in shape.ratios:
        keys = np.minimum(seen, w["sliding_window"])
        if ratio == 4:
            index = w["index_n_heads"] * w["index_head_dim"]
            bf16 += (2 * 2 * (width + w["index_head_dim"]) + w["index_n_heads"]) * hidden
            fp8 += index * (rank + float((seen // ratio).mean()))
            keys = keys + np.minimum(seen // ratio, w["index_topk"])
        elif ratio:
            bf16 += 2 * width * hidden
            keys = keys + seen // ratio
        bf16 += 2 * heads * float(keys.mean())
    return 2 * tokens * fp8, 2 * tokens * bf16
