"""Indexer scores on tensor cores: our kernel and DeepGEMM's, prompts and decode rows.

Some tokens of both sides are compared with sums in doubles before they are timed. The schedules of
both sides are made beforehand, because a step makes them once for all layers. The keys of prompts
are gathered beforehand for DeepGEMM; ours does not need that. The floor is the longer of two times:
the fewest bytes at the copy rate, and the GEMMs at the FP8 rate, both of the same run.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import _gpu, _peers
from benchmarks._logits_sides import Shape, Step, config_of, peer_call, random_cache, shapes

OURS, THEIRS = "tiles", "DeepGEMM"
# of scores against doubles; FP8 GEMMs are summed with fewer bits than float32 has
TOLERANCE = 2e-4
_MOST_SETS = 16
_SUBJECTS = (Shape(64, 1, 4096), Shape(64, 64, 32768), Shape(64, 1, 8192, 2048, True))


def fp8_flops_per_s() -> float:
    """Return rate of an e4m3 GEMM of random 8192 x 8192 matrices, accumulated fast."""
    one = torch.ones((), device="cuda")
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return _gpu.gemm_flops_per_s(
        torch.float8_e4m3fn, lambda left, right: torch._scaled_mm(left, right.T, **options)
    )


def steps_of(shape: Shape, cache: torch.Tensor, logits: torch.Tensor) -> list[Step]:
    """Return steps with pages of their own, together past the L2."""
    count = min(_gpu.num_sets(shape.bytes_moved), _MOST_SETS)
    return [Step(shape, cache, logits, seed) for seed in range(count)]


def compare(
    record: _gpu.Recorder, shape: Shape, cache: torch.Tensor, logits: torch.Tensor,
    gemm: _peers.DeepGemm | None, rate: float,
) -> None:  # fmt: skip
    """Check and time a shape, without DeepGEMM if DeepGEMM refuses it.

    Raises:
        AssertionError: our scores are off by more than rounding, or two runs differ.
    """
    steps, config = steps_of(shape, cache, logits), config_of(shape)
    ours, refused = [step.ours(config) for step in steps], {}
    sides: dict[str, Sequence[_gpu.Call]] = {OURS: ours}
    try:
        if gemm is not None:
            sides = {THEIRS: [peer_call(gemm, step) for step in steps], OURS: ours}
    except RuntimeError as error:
        refused[THEIRS] = str(error)[:200]

    def error_of(label: str) -> float:
        if label == THEIRS:
            return steps[0].error(sides[THEIRS][0]())
        runs = []
        for _ in range(2):
            _gpu.poison(steps[0].logits)
            ours[0]()
            runs.append(steps[0].logits.clone().view(torch.int32))
        assert torch.equal(*runs), f"{shape.label}: differs between two runs"
        found = steps[0].error(steps[0].logits)
        assert found <= TOLERANCE, f"{shape.label}: off by {found:.1e}"
        return found

    sides, errors, left_out = _gpu.checked(shape.label, sides, error_of, most=1)
    record.case(
        shape.label,
        _gpu.interleaved(sides, rounds=15),
        ours=OURS,
        floor_us=shape.floor_us(record.ceilings["copy_bytes_per_s"], rate),
        errors=errors,
        left_out=refused | left_out,
    )


def scores_for(chosen: Sequence[Shape]) -> torch.Tensor:
    """Return memory for the scores of the largest of some shapes."""
    return torch.empty(max(s.num_tokens * s.keys for s in chosen), device="cuda")


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """Yield a case for each shape."""
    gemm, chosen = _peers.deep_gemm(args.peers), list(shapes(args.quick))
    cache, logits = random_cache(), scores_for(chosen)
    rate = fp8_flops_per_s()
    record.note(fp8_flops_per_s=rate)
    for shape in chosen:
        yield shape.label, partial(compare, record, shape, cache, logits, gemm, rate)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Return the launches of one row, of a decode step, and of a prompt's chunk."""
    cache, found = random_cache(), {}
    for shape in _SUBJECTS:
        step = Step(shape, cache, scores_for([shape]), 0)
        found[shape.label] = step.ours(config_of(shape)), [step.logits]
    return found


main = partial(_gpu.main, "indexer_logits", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
