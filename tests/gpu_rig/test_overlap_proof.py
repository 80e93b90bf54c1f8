"""The meter of the proof of overlap: what it says of spans that are known."""

from __future__ import annotations

import pytest

from tests.gpu_rig.overlap_proof import Run, covered

# ten steps of 90 us, each 10 us after the one before
WORK = [(100.0 * step, 100.0 * step + 90) for step in range(10)]


@pytest.mark.parametrize(
    ("span", "share"),
    [((10, 20), 1.0), ((85, 95), 0.5), ((91, 99), 0.0), ((80, 120), 0.75), ((-50, -10), 0.0)],
)
def test_the_share_of_a_span_inside_work(span: tuple[float, float], share: float) -> None:
    assert covered(span, WORK) == pytest.approx(share)


def test_copies_beside_the_step_before_and_copies_behind_it() -> None:
    # the copy of step n is inside the work of step n - 1, or between the two
    beside = Run([(begin - 60, begin - 40) for begin, _ in WORK], WORK).figures()
    after = Run([(begin - 9, begin - 1) for begin, _ in WORK], WORK).figures()
    assert (beside["median"], beside["share_of_steps_above_80"]) == (1.0, 1.0)
    assert (after["median"], after["share_of_steps_above_80"]) == (0.0, 0.0)
    assert beside["copy_us"] == 20 and beside["work_us"] == 90 and beside["steps"] == 7
