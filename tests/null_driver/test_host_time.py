"""Host time of an eager step, against a fixed loop of Python that is timed beside it."""

from __future__ import annotations

import pytest

from benchmarks import host_time
from benchmarks._harness import Worker
from tests.null_driver.marks import NULL_DRIVER

pytestmark = [pytest.mark.slow, *NULL_DRIVER]

CASE = host_time.Case(8, 256, 128)
# turns of the fixed loop; benchmarks/results/host_time.json has 118 to 129
MOST_TURNS_A_LAUNCH = 240


def test_a_launch_takes_no_longer_than_some_turns_of_a_loop() -> None:
    pytest.importorskip("paddle")
    model = host_time.v32(layers=3, dense=1, experts=16)
    with Worker(host_time.TARGET, model=model, ranks=4) as worker:
        side = host_time.times({"fd_dsa": worker}, CASE, rounds=2)["fd_dsa"]
        causes = host_time.causes(worker, CASE, side["ms"]["p50"])
    assert side["turns_a_launch"] < MOST_TURNS_A_LAUNCH, causes
