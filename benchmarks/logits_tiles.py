"""Forms of the indexer's tile kernel (tokens, registers, pages in flight): device time of each.

python -m benchmarks.logits_tiles           # what the numbers of tile_forms.py came from
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks import _gpu
from benchmarks._logits_forms import CHOSEN, candidates, compile_ahead
from benchmarks._logits_shapes import Shape
from benchmarks._logits_sides import Step, random_cache
from benchmarks._torch_device import register
from benchmarks.indexer_logits import TOLERANCE, scores_for, steps_of
from fd_dsa.ops.indexer_logits.tile_forms import TileForm

PROMPTS = tuple(Shape(heads, 1, keys << 10, 2048, True) for heads in (64, 32) for keys in (8, 32))
DECODE = (
    Shape(64, 1, 4 << 10),
    Shape(64, 1, 128 << 10),
    Shape(64, 32, 4 << 10),
    Shape(64, 64, 32 << 10),
    *(Shape(64, 64, 32 << 10, new) for new in (2, 3, 4)),
    Shape(32, 64, 32 << 10),
)


def fits(step: Step, form: TileForm) -> bool:
    """Whether a form can be launched and is right; says why not."""
    _gpu.poison(step.logits)
    try:
        step.ours(form)()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{step.shape.label}: {form} left out: {str(error)[:100]}", flush=True)
        return False
    error = step.error(step.logits)
    assert error <= TOLERANCE, f"{step.shape.label}: {form}: {error}"
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all choices; returns 0."""
    args = _gpu.arguments(__doc__, argv)
    register()
    chosen = [PROMPTS[1], DECODE[3]] if args.quick else [*PROMPTS, *DECODE]
    compile_ahead(chosen)
    cache, logits = random_cache(), scores_for(chosen)
    with _gpu.Recorder("logits_tiles", args.out) as record:
        for shape in chosen:
            steps = steps_of(shape, cache, logits)
            forms = {label: f for label, f in candidates(shape) if fits(steps[0], f)}
            sides = {label: [step.ours(form) for step in steps] for label, form in forms.items()}
            times = _gpu.interleaved(sides, rounds=10)
            best = sorted(times, key=lambda label: times[label]["p50"])[:3]
            print(f"{shape.label}: best {best}", flush=True)
            record.case(
                shape.label, times, ours=CHOSEN, bytes_moved=shape.bytes_moved, best=best,
                flops_per_s=shape.flops / times[best[0]]["p50"] * 1e6,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
