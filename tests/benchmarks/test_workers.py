"""Workers of the CPU benchmarks, and the line through their figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks._harness import Worker


def test_the_engine_is_timed_with_all_requests_decoding() -> None:
    with Worker("benchmarks.workers.engine_host") as worker:
        for requests in (1, 40):
            case = {"requests": requests, "sampling": {"temperature": 0}, "steps": 3}
            answer = worker.call(op="host_us", **case, vocab_size=129_280)
            assert len(answer["us"]) == 3 and min(answer["us"]) > 0


def test_a_worker_of_another_checkout_is_refused_where_that_has_no_package(tmp_path: Path) -> None:
    with (
        Worker("benchmarks.workers.engine_host", checkout=tmp_path) as worker,
        pytest.raises(RuntimeError, match="worker ended with status 1"),
    ):
        worker.call(op="pass_us", requests=1, steps=1, vocab_size=4096)


def test_a_line_through_the_medians() -> None:
    times = {n: [100 + 3 * n] * 3 for n in growth.REQUESTS}
    fitted = growth._fitted(times)
    assert fitted["a_us"] == pytest.approx(100) and fitted["b_us"] == pytest.approx(3)
