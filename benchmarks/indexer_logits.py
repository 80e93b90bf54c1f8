"""Indexer scores on tensor cores: our kernel beside DeepGEMM's, prompts and decode rows.

Some tokens of both sides are compared with sums in doubles before they are timed. Schedules, which
a step makes once for all layers, are made beforehand and timed by themselves; DeepGEMM also has the
keys of prompts gathered beforehand, which ours does not need. The floor is the time of the fewest
bytes at the copy rate or of the GEMMs at the FP8 rate of the same run, whichever is longer.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import _gpu, _peers
from benchmarks._logits_shapes import Shape, shapes
from benchmarks._logits_sides import Step, form_of, peer_call, random_cache

OURS, THEIRS, SCHEDULE = "tiles", "DeepGEMM", "schedule"
# of scores against doubles; FP8 GEMMs are summed with fewer bits than float32 has
TOLERANCE = 2e-4
_MOST_SETS = 16
_SUBJECTS = (Shape(64, 1, 4096), Shape(64, 64, 32768), Shape(64, 1, 8192, 2048, True))


def fp8_flops_per_s() -> float:
    """Rate of an e4m3 GEMM of random 8192 x 8192 matrices, accumulated fast."""
    one = torch.ones((), device="cuda")
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return _gpu.gemm_flops_per_s(
        torch.float8_e4m3fn, lambda left, right: torch._scaled_mm(left, right.T, **options)
    )


def steps_of(shape: Shape, cache: torch.Tensor, logits: torch.Tensor) -> list[Step]:
    """Steps in pages of their own, together past the L2."""
    count = min(_gpu.num_sets(shape.bytes_moved), _MOST_SETS)
    return [Step(shape, cache, logits, seed) for seed in range(count)]


def error_of_ours(step: Step) -> float:
    """Deviation of our scores from doubles.

    Raises:
        AssertionError: it is more than rounding, or two runs differ.
    """
    call = step.ours(form_of(step.shape))
    _gpu.poison(step.logits)
    call()
    found = step.error(step.logits)
    first = step.logits.clone()
    _gpu.poison(step.logits)
    call()
    same = torch.equal(first.view(torch.int32), step.logits.view(torch.int32))
    assert same, f"{step.shape.label}: differs between two runs"
    assert found <= TOLERANCE, f"{step.shape.label}: off by {found:.1e}"
    return found


def compare(
    record: _gpu.Recorder, shape: Shape, cache: torch.Tensor, logits: torch.Tensor,
    gemm: _peers.DeepGemm | None, rate: float,
) -> None:  # fmt: skip
    """Check and time one shape; without DeepGEMM where it refuses it."""
    steps, form = steps_of(shape, cache, logits), form_of(shape)
    found, left_out = {OURS: error_of_ours(steps[0])}, {}
    sides: dict[str, list[_gpu.Call]] = {}
    if gemm is not None:
        try:
            theirs = [peer_call(gemm, step) for step in steps]
            found[THEIRS] = steps[0].error(theirs[0]())
            sides[THEIRS] = theirs
        except RuntimeError as error:
            left_out[THEIRS] = str(error)[:200]
            print(f"{shape.label}: {THEIRS} left out: {left_out[THEIRS]}", flush=True)
    sides[OURS] = [step.ours(form) for step in steps]
    times = _gpu.interleaved(sides, rounds=15)
    fills = [step.schedule(form)[1] for step in steps]
    schedule = _gpu.interleaved({SCHEDULE: fills}, mode="graph", rounds=5)
    record.case(
        shape.label,
        times,
        ours=OURS,
        floor_us=shape.floor_us(record.ceilings["copy_bytes_per_s"], rate),
        errors=found,
        left_out=left_out,
        form=vars(form),
        schedule_us=schedule[SCHEDULE]["p50"],
        flops_per_s=shape.flops / times[OURS]["p50"] * 1e6,
        clocks=_gpu.clocks(),
    )


def scores_for(chosen: Sequence[Shape]) -> torch.Tensor:
    """Memory for the scores of the largest of some shapes."""
    return torch.empty(max(s.num_tokens * s.keys for s in chosen), device="cuda")


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One for each shape."""
    gemm, chosen = _peers.deep_gemm(args.peers), list(shapes(args.quick))
    cache, logits = random_cache(), scores_for(chosen)
    rate = fp8_flops_per_s()
    record.note(peer="DeepGEMM 2.5.0 of vLLM 0.26.0", fp8_flops_per_s=rate)
    for shape in chosen:
        yield shape.label, partial(compare, record, shape, cache, logits, gemm, rate)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """One row, a decode step, and a chunk of a prompt."""
    cache, found = random_cache(), {}
    for shape in _SUBJECTS:
        step = Step(shape, cache, scores_for([shape]), 0)
        found[shape.label] = step.ours(form_of(shape)), [step.logits]
    return found


main = partial(_gpu.main, "indexer_logits", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
