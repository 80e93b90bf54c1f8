"""Attention of prompts within index_topk at the sizes of DeepSeek-V3.2: dense beside absorbed.

    python -m benchmarks.prompt_attention --rig               # the form that serves
    python -m benchmarks.prompt_attention --rig --tilings     # and every other one

Both sides take queries as projected and give what o_proj reads, in FP8, over a cache of FP8
records. Dense: the gather of the keys, GEMMs with kv_b_proj, and attention; absorbed: GEMMs of
queries and results with kv_b_proj, the query, and sparse MLA over all keys. Their results are
compared first. Each figure is a replay of a graph of four calls; FLOPs are those of causal
attention in either form, and of its GEMMs. Writes prompt_attention.json of benchmarks/results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks._harness import rig_parser, rig_result, write_json
from benchmarks.gpu_gemms import Bench

HEADS, NOPE, ROPE, VALUES, RANK, TOPK, BLOCK = 128, 128, 64, 128, 512, 2048, 64
CASES = {"4 x 2048": (4, 2048, 0), "32 x 256": (32, 256, 0), "4 x 1024 after 1024": (4, 1024, 1024)}
_REPEATS, _WORST = 4, 0.02


class Prompts:
    """Rows of one length, and both ways to attend for them.

    Attributes:
        flops: operations of the dense and of the absorbed form.
    """

    def __init__(self, bench: Bench, rows: int, new: int, cached: int, heads: int = HEADS) -> None:
        from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig
        from fd_dsa.ops.device_matrix import DeviceMatrix
        from fd_dsa.ops.fill_kernels import fill_random
        from fd_dsa.step import StepHints

        self._bench, total, length = bench, rows * new, new + cached
        columns = -(-length // BLOCK)
        layout = CacheLayout("fp8_ds_mla", BLOCK, RANK, ROPE, 128)
        sizes = (heads, 64, TOPK, 0.1, layout, rows, total, columns, rows * columns, "bfloat16")
        config = DSABackendConfig(*sizes, head_widths=(NOPE, VALUES))
        backend = DSAAttentionBackend(config, bench.device, bench.allocate)
        self.attention, self.prompts = backend.attention, backend.attention.dense_prompts
        (latents, keys), lengths = (
            backend.allocate_caches([True]),
            np.full((3, rows), new, np.int32),
        )
        lengths[1] = cached
        tables = np.random.default_rng(0).permutation(rows * columns).astype(np.int32)
        meta, inputs = SimpleNamespace(), (*lengths, tables.reshape(rows, columns))
        backend.build_step(meta, inputs, StepHints(total, total, length), tuple(lengths))
        self._step, self._cache = meta.fd_dsa_step, latents
        fill_latents(latents)

        def random(*shape: int, deviation: float = 1.0) -> Any:
            made = bench.allocate(shape, "bfloat16")
            fill_random(made, 0, int(np.prod(shape)), [len(shape), *shape], deviation)
            return made

        self._q = random(total, heads, NOPE + ROPE)
        self._cos_sin = bench.allocate((total, ROPE), "float32")
        fill_random(self._cos_sin, 0, total * ROPE, [5], 0.7)
        self.k_b = DeviceMatrix(random(heads, NOPE, RANK, deviation=RANK**-0.5))
        self.v_b = DeviceMatrix(random(heads, RANK, VALUES, deviation=RANK**-0.5))
        self.plain = DeviceMatrix(random(8, 8))
        self.fp8 = DeviceMatrix(*bench.weight(128, 128), round_scales=True)
        self._slots = self.attention.select(self._step, None, None, keys)
        pairs = rows * (length * (length + 1) - cached * (cached + 1)) // 2
        per_key = rows * length * RANK * (NOPE + VALUES)
        self.attention_flops = 2 * heads * pairs * (NOPE + ROPE + VALUES)
        self.flops = {
            "dense": self.attention_flops + 2 * heads * per_key,
            "absorbed": 2 * heads * (pairs * (2 * RANK + ROPE) + total * RANK * (NOPE + VALUES)),
        }

    def dense(self, reader: Any) -> Any:
        """Run the dense form, which serves."""
        layer = SimpleNamespace(k_b_proj=self.k_b, v_b_proj=self.v_b, o_proj=reader)
        return self.prompts.attend(self._step, self._q, self._cos_sin, self._cache, layer)

    def absorbed(self, reader: Any) -> Any:
        """Run the absorbed form, which serves past index_topk."""
        attention = self.attention
        query = attention.absorbed_query(self.k_b, self._q, None, self._cos_sin)
        latent = attention.attend(self._step, query, self._cache, self._slots)
        return self.v_b.matmul_join_heads(latent, reader)

    def difference(self) -> float:
        """Return the relative root mean square difference of both forms."""
        one, other = (
            call(self.plain).astype("float32").numpy().ravel()
            for call in (self.dense, self.absorbed)
        )
        return float(np.linalg.norm(one - other) / np.linalg.norm(other))

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Return the launches of the dense form, for a step whose keys are one group."""
        from fd_dsa.attention import dense_prompts as form
        from fd_dsa.ops.head_gemm import empty_heads, head_gemm

        (group,), p = self.prompts.groups, self.prompts
        latents, rope = p.latents[: group.num_keys], p.rope[: group.num_keys]
        gather = partial(form.gather_keys, self._cache, self._step, group, TOPK, latents, rope)
        keys, values = form.keys_and_values(latents, self.k_b.values, self.v_b.values)
        out = empty_heads(self._q, len(self._q), *self.v_b.values.shape[::2], True)
        attend = partial(
            form.attend_prompts,
            *(self._q, self._cos_sin, keys, values, rope, self._step, group, out),
            index_topk=TOPK,
            softmax_scale=0.1,
            rows=p.rows,
            round_scales=True,
        )
        return {
            "gather": partial(gather, p.rows),
            "keys and values": partial(
                form.keys_and_values, latents, self.k_b.values, self.v_b.values
            ),
            "values": partial(head_gemm, latents, self.v_b.values),
            "attention": lambda tiling=None: attend(tiling=tiling or p.tiling),
        }

    def time_us(self, call: Callable[[], Any]) -> float:
        """Return the microseconds of a call."""
        return self._bench.time_us([call] * _REPEATS)


def fill_latents(cache: Any) -> None:
    """Write records of normal latents to every slot."""
    from fd_dsa.device.transfers import Upload
    from fd_dsa.ops.cache_write import bfloat16_bits
    from fd_dsa.ops.fp8 import encode_e4m3

    rng, shape = np.random.default_rng(1), tuple(cache.shape)
    records = np.zeros((int(np.prod(shape[:-1])), shape[-1]), np.uint8)
    values = rng.standard_normal((len(records), RANK), dtype=np.float32)
    records[:, :RANK] = encode_e4m3(values * 64)
    records[:, RANK : RANK + 16] = np.full(4, 2.0**-6, np.float32).view(np.uint8)
    rope = rng.standard_normal((len(records), ROPE), dtype=np.float32)
    records[:, RANK + 16 :] = bfloat16_bits(rope).view(np.uint8)
    upload = Upload(cache)
    upload.copy(cache, 0, records)
    upload.finish()


def cases(bench: Bench, *, tilings: bool) -> Iterator[dict[str, Any]]:
    """Yield each case: both forms, and the parts of the dense form."""
    from fd_dsa.ops.mla.prompt import CANDIDATES

    for name, sizes in CASES.items():
        prompts = Prompts(bench, *sizes)
        entry: dict[str, Any] = {"case": name, "difference": prompts.difference()}
        if not entry["difference"] < _WORST:
            yield entry
            continue
        for form, call in (("dense", prompts.dense), ("absorbed", prompts.absorbed)):
            entry[f"{form}_us"] = time = prompts.time_us(partial(call, prompts.fp8))
            entry[f"{form}_tflops"] = prompts.flops[form] / time / 1e6
        parts = prompts.parts()
        entry["parts_us"] = {part: prompts.time_us(call) for part, call in parts.items()}
        attend, rate = parts["attention"], prompts.attention_flops / 1e6
        entry["attention_tflops"] = rate / entry["parts_us"]["attention"]
        # rows, columns, num_warps, num_stages
        entry["tiling"] = prompts.prompts.tiling[:4]
        for tiling in CANDIDATES if tilings else ():
            try:
                time = prompts.time_us(partial(attend, tiling))
            except Exception as error:
                print(f"    {tiling} refused: {str(error)[:80]}", flush=True)
                continue
            entry.setdefault("tilings", []).append([list(tiling[:4]), time, rate / time])
            print(f"    {tiling} {time:.1f} us, {rate / time:.0f} TFLOP/s", flush=True)
        yield entry
        # one case is enough to choose by
        tilings = False


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 1 if the forms disagree."""
    parser = rig_parser(__doc__, is_dry=False)
    parser.add_argument("--tilings", action="store_true", help="every tiling that may serve")
    args = parser.parse_args(argv)
    result = rig_result("prompt_attention", args)
    found = result["cases"]
    for entry in cases(Bench(args.rig), tilings=args.tilings):
        found.append(entry)
        write_json(args.out / "prompt_attention.json", result)
        for key, value in entry.items():
            print(f"{entry['case']}: {key} {value}", flush=True)
    return int(not all("dense_us" in entry for entry in found))


if __name__ == "__main__":
    sys.exit(main())
