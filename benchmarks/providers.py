"""FlashMLA and DeepGEMM in the place of our kernels: the same results, and the time of both.

Both serve through `DeviceAttention`, as in an engine: one step's metadata, schedules once a step.
First results are compared with those of our kernels, then a graph is captured and replayed in a
later step of other lengths, then both are timed. "scores" are those of the indexer alone,
"selection" has the choice of the best keys behind them, which is ours on both sides. Of a share of
the heads, as several GPUs have, attention alone is timed: the indexer is whole on each of them.
Keys lie in random pages, queries are random; 2048 keys are chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import _gpu, _packages
from benchmarks._harness import ROOT
from benchmarks._torch_device import register
from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device import DeviceAttention
from fd_dsa.ops._third_party import third_party_table
from fd_dsa.ops.indexer_logits.tile_kernel import score_tiles
from fd_dsa.step import StepMetadataBuilder

Rows = list[tuple[int, int, int]]

BLOCK, TOPK, MAX_ROWS, MAX_TOKENS, MAX_KEYS = 64, 2048, 128, 2048, 1 << 15
NUM_BLOCKS = MAX_ROWS * MAX_KEYS // BLOCK
DEVICE = "cuda"
OURS = "our kernel"
# attention heads: index heads; V3.2 and GLM-5 on one device, V3.2 on 4 and 8, GLM-5 on 8
MODELS = {128: 64, 64: 32, 32: 64, 16: 64, 8: 32}
_WHOLE = (128, 64)
DECODE = [(rows, keys, 1) for keys in (4096, 32768) for rows in (1, 32, 128)]
DECODE += [(32, 32768, 2), (128, 32768, 2)]
# a chunk of a prompt behind a cached prefix among decoding rows; the last chunk of a long prompt
PROMPTS: dict[str, Rows] = {
    "512 of 8 k, 31 rows of 16 k": [(512, 7680, 512), *[(0, 16383, 1)] * 31],
    "2048 of 32 k": [(2048, 30720, 2048)],
}


def allocate(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Uninitialised memory of the GPU."""
    return torch.empty(shape, device=DEVICE, dtype=getattr(torch, dtype))


def decode_rows(rows: int, keys: int, new: int) -> Rows:
    """Rows that have `keys` keys after the step, `new` of them from it."""
    return [(0, keys - new, new)] * rows


class Model:
    """A layer's caches and queries, and a DeviceAttention of either kind.

    Attributes:
        ours, theirs: with our kernels alone, and with the packages.
        index_q, weights, q: of MAX_TOKENS tokens.
    """

    def __init__(self, num_heads: int, index_heads: int) -> None:
        self.config = DSABackendConfig(
            num_heads=num_heads,
            index_n_heads=index_heads,
            index_topk=TOPK,
            softmax_scale=0.1352,
            cache_layout=CacheLayout("fp8_ds_mla", BLOCK, 512, 64, 128),
            max_num_seqs=MAX_ROWS,
            max_num_tokens=MAX_TOKENS,
            max_blocks_per_seq=MAX_KEYS // BLOCK,
            num_blocks=NUM_BLOCKS,
            dtype="bfloat16",
        )
        limits = (MAX_ROWS, MAX_TOKENS, MAX_KEYS // BLOCK, BLOCK, NUM_BLOCKS)
        self.builder = StepMetadataBuilder(*limits, device="gpu", allocate=allocate)
        with _packages.hidden():
            self.ours = DeviceAttention(self.config, allocate)
        self.theirs = DeviceAttention(self.config, allocate)
        self.latents, self.keys = latent_cache(), index_cache()
        self.index_q, self.weights = self.theirs.query_buffers(MAX_TOKENS)
        self.index_q.copy_(codes(*self.index_q.shape))
        self.weights.normal_()
        self.q = torch.randn(MAX_TOKENS, num_heads, 576, device=DEVICE).bfloat16() * 0.1

    def step(self, rows: Rows, num_padded: int | None = None, seed: int = 0) -> Any:
        """The metadata of rows in random pages; the packages are ready for it."""
        rng = np.random.default_rng(seed)
        lengths = np.array(rows, np.int32)
        tables = rng.permutation(NUM_BLOCKS).astype(np.int32).reshape(MAX_ROWS, -1)[: len(rows)]
        arrays = [np.ascontiguousarray(column) for column in lengths.T]
        step = self.builder.build(*arrays, tables, num_padded)
        self.ours.begin_step(step)
        self.theirs.begin_step(step)
        return step

    def select(self, attention: DeviceAttention, step: Any) -> torch.Tensor:
        """Slots of the step's tokens."""
        tokens = slice(step.position_ids.shape[0])
        return attention.select(step, self.index_q[tokens], self.weights[tokens], self.keys)

    def attend(self, attention: DeviceAttention, step: Any, slots: torch.Tensor) -> torch.Tensor:
        """Outputs of the step's tokens."""
        return attention.attend(step, self.q[: slots.shape[0]], self.latents, slots)

    def our_scores(self, step: Any) -> torch.Tensor:
        """float32 [tokens, width] of our kernel, in its buffer."""
        tiles, tokens = self.ours._scores, step.position_ids.shape[0]
        form, schedule = tiles._kind(step)
        stride, rows = tiles._chunks(step)
        assert tokens <= rows, "scores of one chunk are timed"
        logits = tiles._logits(tokens, stride, tiles._width(step))
        score_tiles(
            self.index_q[:tokens],
            self.weights[:tokens],
            self.keys,
            step.position_ids,
            step.block_tables,
            schedule,
            logits,
            form=form,
        )
        return logits

    def their_scores(self, step: Any, gathered: bool) -> torch.Tensor:
        """The same by DeepGEMM, of one kind of tokens: with keys in pages, or gathered."""
        scores = self.theirs._third_party.scores
        assert scores is not None, "DeepGEMM does not serve"
        width = scores._width(step)
        (chunk,) = scores._chunks_of(step, width)
        if not gathered:
            return scores._score_pages(chunk, self.keys, width)
        return scores._score_gathered(chunk, *scores._gather(step, self.keys), width)


def codes(*shape: int) -> torch.Tensor:
    """uint8 bits of random e4m3 numbers."""
    return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8)


def latent_cache() -> torch.Tensor:
    """uint8 [NUM_BLOCKS, 1, 64, 656]: records of random latents."""
    cache = torch.empty(NUM_BLOCKS, 1, BLOCK, 656, device=DEVICE, dtype=torch.uint8)
    for part in cache.view(-1, 656).split(1 << 18):
        part[:, :512] = codes(len(part), 512)
        part[:, 512:528] = (torch.rand(len(part), 4, device=DEVICE) * 0.5 + 0.5).view(torch.uint8)
        rope = torch.randn(len(part), 64, device=DEVICE, dtype=torch.bfloat16)
        part[:, 528:] = rope.view(torch.uint8)
    return cache


def index_cache() -> torch.Tensor:
    """uint8 [NUM_BLOCKS, 64, 132]: blocks of random keys, then their scales."""
    cache = torch.empty(NUM_BLOCKS, BLOCK * 132, device=DEVICE, dtype=torch.uint8)
    for part in cache.split(1 << 13):
        part[:, : BLOCK * 128] = codes(len(part), BLOCK * 128)
        scales = torch.rand(len(part), BLOCK, device=DEVICE) * 0.02 + 0.005
        part[:, BLOCK * 128 :] = scales.view(torch.uint8)
    return cache.view(NUM_BLOCKS, BLOCK, 132)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, relative."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def recall(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Least share of a token's wanted slots that were found."""
    both = torch.cat([found, wanted], dim=1).sort(dim=1).values
    common = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)
    return float((common / (wanted >= 0).sum(1).clamp(min=1))[wanted[:, 0] >= 0].min())


def check(model: Model, name: str, rows: Rows) -> dict[str, float]:
    """Compare a step's results with those of our kernels; two padded tokens behind it.

    Raises:
        AssertionError: they differ by more than rounding, or between two runs.
    """
    tokens = sum(new for _, _, new in rows)
    step = model.step(rows, min(tokens + 2, MAX_TOKENS))
    wanted = model.select(model.ours, step).clone()
    slots = model.select(model.theirs, step).clone()
    found = {"recall": recall(slots, wanted)}
    out = model.attend(model.theirs, step, wanted).clone()
    found["attention"] = relative(out, model.attend(model.ours, step, wanted))
    again = model.attend(model.theirs, step, wanted)
    assert torch.equal(out, again), f"{name}: attention differs between two runs"
    assert torch.equal(slots, model.select(model.theirs, step)), f"{name}: slots differ"
    assert not out[tokens:].any() and (slots[tokens:] == -1).all(), f"{name}: padded tokens"
    ours = model.our_scores(step)[:tokens]
    prompts = torch.tensor([row[0] > 0 for row in rows for _ in range(row[2])], device=DEVICE)
    seen = torch.arange(ours.shape[1], device=DEVICE) <= step.position_ids[:tokens, None]
    for kind, mine in (("pages", ~prompts), ("gathered", prompts)):
        if mine.any():
            theirs = model.their_scores(step, kind == "gathered")[:tokens, : ours.shape[1]]
            pick = seen & mine[:, None]
            found[kind] = relative(theirs[pick], ours[pick])
    print(f"{name}: " + ", ".join(f"{k} {v:.2e}" for k, v in found.items()), flush=True)
    assert found["recall"] > 0.99 and found["attention"] < 1e-2, f"{name}: {found}"
    assert max(found.get("pages", 0), found.get("gathered", 0)) < 1e-3, f"{name}: {found}"
    return found


def check_graph(model: Model, name: str, new: int) -> None:
    """Capture a step of 64 rows, and replay it in one of 40 rows with other lengths and pages.

    Raises:
        AssertionError: the replay gives another result than the same step without a graph.
    """
    rng = np.random.default_rng(new)
    padded = 64 * new
    step = model.step([(0, int(n), new) for n in rng.integers(3000, 30000, 64)], padded, seed=1)
    model.attend(model.theirs, step, model.select(model.theirs, step))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = model.select(model.theirs, step)
        out = model.attend(model.theirs, step, slots)
    lengths = [int(n) for n in rng.integers(2500, 32000, 40)]
    rows = [(0, n, new) if i % 5 else (0, 0, 0) for i, n in enumerate(lengths)]
    step = model.step(rows, padded, seed=2)
    model.q.copy_(torch.randn_like(model.q) * 0.1)
    model.index_q.copy_(codes(*model.index_q.shape))
    graph.replay()
    replayed = slots.clone(), out.clone()
    wanted = model.select(model.theirs, step)
    assert torch.equal(replayed[0], wanted), f"{name}: slots of a replay differ"
    outputs = model.attend(model.theirs, step, wanted)
    assert torch.equal(replayed[1], outputs), f"{name}: outputs of a replay differ"
    used = sum(row[2] for row in rows)
    assert (replayed[0][used:] == -1).all() and not replayed[1][used:].any(), name
    print(f"{name}: a replay is right", flush=True)


def compare_attention(record: _gpu.Recorder, model: Model, name: str, rows: Rows) -> None:
    """Time a step's attention by our kernel and by FlashMLA."""
    step = model.step(rows)
    mla = model.theirs._third_party.attention
    assert mla is not None, "FlashMLA does not serve"
    slots = model.select(model.ours, step).clone()
    sides = {OURS: lambda: model.attend(model.ours, step, slots)}
    sides["FlashMLA"] = lambda: model.attend(model.theirs, step, slots)
    tokens, heads = slots.shape[0], model.config.num_heads
    floor = 656 * int((slots >= 0).sum()) + 2176 * tokens * heads
    notes = {"heads": heads, "kernel_heads": mla.heads}
    timed(record, "attention", name, sides, "FlashMLA", floor, **notes)


def compare_indexer(record: _gpu.Recorder, model: Model, name: str, rows: Rows) -> None:
    """Time a step's scores and selection by our kernels and by DeepGEMM."""
    step = model.step(rows)
    tokens = step.position_ids.shape[0]
    pairs = sum(n * (d + (n + 1) / 2) for _, d, n in rows)
    keys = sum(d + n for _, d, n in rows)
    floor = 132 * keys + 4 * pairs
    has_prompt = any(encoder for encoder, _, _ in rows)
    # what one kind leaves to the other costs it little, so each is the time of its own tokens
    sides: dict[str, Callable[[], Any]] = {OURS: lambda: model.our_scores(step)}
    sides["DeepGEMM, pages"] = lambda: model.their_scores(step, False)
    if has_prompt:
        sides["DeepGEMM, gathered"] = lambda: model.their_scores(step, True)
    elif rows[0][2] == 2:
        sides["DeepGEMM, rows of 2"] = rows_of_two(model, tokens, step)
    notes = {"heads": model.config.index_n_heads}
    timed(record, "scores", name, sides, [*sides][1 + has_prompt], floor, **notes)
    sides = {OURS: lambda: model.select(model.ours, step)}
    sides["DeepGEMM"] = lambda: model.select(model.theirs, step)
    timed(record, "selection", name, sides, "DeepGEMM", floor + 4 * pairs, **notes)
    if has_prompt:
        with_all_in_pages(record, model, name, step, floor)


def rows_of_two(model: Model, tokens: int, step: Any) -> Callable[[], Any]:
    """DeepGEMM's own form of two tokens a row, of which it reads each key once."""
    scores = model.theirs._third_party.scores
    assert scores is not None
    gemm, width = scores._gemm, scores._width(step)
    lengths = scores._rows.lengths[:tokens].reshape(-1, 2).contiguous()
    tables = scores._rows.tables[1:tokens:2].contiguous()
    schedule = gemm._schedule(lengths, BLOCK, gemm.num_parts)
    queries = scores._e4m3[:tokens].reshape(-1, 2, *model.index_q.shape[1:])
    weights = model.weights[:tokens]
    cache = model.keys.reshape(NUM_BLOCKS, BLOCK, 1, 132)
    arguments = (cache, weights, lengths, tables, schedule, width)
    given = (queries, None) if gemm._paged_takes_pair else queries
    return lambda: gemm._paged(given, *arguments, clean_logits=False)


def with_all_in_pages(
    record: _gpu.Recorder, model: Model, name: str, step: Any, floor: float
) -> None:
    """Time DeepGEMM on a step with prompts none of whose keys are gathered."""
    scores = model.theirs._third_party.scores
    assert scores is not None
    room, scores._max_gathered = scores._max_gathered, 0
    model.theirs.begin_step(step)
    label = "DeepGEMM, pages"
    sides = {label: lambda: model.their_scores(step, False)}
    timed(record, "scores, all in pages", name, sides, label, floor)
    scores._max_gathered = room


def timed(
    record: _gpu.Recorder,
    what: str,
    name: str,
    sides: dict[str, Callable[[], Any]],
    ours: str,
    floor: float,
    **notes: Any,
) -> None:
    """One case: device time in graphs, and what a call keeps the host when it is eager."""
    calls = {label: [call] for label, call in sides.items()}
    times = _gpu.interleaved(calls, rounds=15)
    host = _gpu.interleaved(calls, mode="host", rounds=5)
    notes |= {"what": what, "step": name.partition(", ")[2], "host_us": host}
    record.case(f"{what}, {name}", times, ours=ours, bytes_moved=floor, **notes)


def run(record: _gpu.Recorder, heads: int, quick: bool) -> None:
    """Everything of one model."""
    model, name = Model(heads, MODELS[heads]), f"{heads} heads"
    sizes = [(32, 32768, 1)] if quick else DECODE
    if heads not in _WHOLE:
        sizes = [size for size in sizes if size[1:] == (32768, 1)]
    model.step(decode_rows(1, 4096, 1))
    serving = {x.package: x.reason for x in third_party_table() if x.serves}
    assert len(serving) == 2, f"{name}: {third_party_table()}"
    cases = {
        f"{name}, {rows} x {keys} keys, {new} new": decode_rows(rows, keys, new)
        for rows, keys, new in sizes
    }
    cases |= {f"{name}, {prompt}": rows for prompt, rows in PROMPTS.items()}
    checks = {case: check(model, case, rows) for case, rows in cases.items()}
    for new in (1, 2):
        check_graph(model, f"{name}, {new} new", new)
    record.note(**{f"checks_{heads}": checks, f"serving_{heads}": serving})
    for case, rows in cases.items():
        if heads in _WHOLE:
            compare_indexer(record, model, case, rows)
        compare_attention(record, model, case, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and compare; returns the exit status."""
    args = _gpu.arguments(__doc__, argv)
    register()
    found = _packages.register(args.peers, ROOT / "build" / "deep_gemm_cache")
    if len(found) < 2:
        print(f"providers left out: only {found} in --peers")
        return 0
    with _gpu.Recorder("providers", args.out) as record:
        record.note(peer="FlashMLA and DeepGEMM 2.5.0 of vLLM 0.26.0")
        for heads in MODELS:
            run(record, heads, args.quick)
            torch.cuda.empty_cache()
    return 0


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """None: these kernels are not ours to profile, and their repeats are checked above."""
    return {}


if __name__ == "__main__":
    sys.exit(main())
