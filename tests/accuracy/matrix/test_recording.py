"""What is recorded of an engine is what it did."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from fd_dsa.accuracy.matrix.recording import NUM_CANDIDATES, Request, pack, record, unpack
from tests.engine.fakes import expected_greedy, make_engine

REQUESTS = [
    Request("a", (2, 3, 4, 5, 6), 6, ignore_eos=True),
    Request("b", (7, 8), 9),
    Request("c", tuple(range(2, 32)), 4, ignore_eos=True),
]


def test_tokens_and_the_logits_behind_them() -> None:
    engine, told = make_engine(), []
    runner = engine.runner
    traces = record(engine, REQUESTS, told.append)
    assert engine.runner is runner
    for request in REQUESTS:
        trace = traces[request.key]
        prompt, eos = list(request.token_ids), None if request.ignore_eos else 1
        assert trace.token_ids.tolist() == expected_greedy(prompt, request.max_tokens, eos)
        for place, token in enumerate(trace.token_ids.tolist()):
            logits = runner._logits([*prompt, *trace.token_ids.tolist()[:place]])
            assert trace.candidates[place, 0] == token == logits.argmax()
            np.testing.assert_array_equal(
                trace.logits[place], np.sort(logits)[::-1][:NUM_CANDIDATES]
            )
            assert trace.checksums[place] == zlib.crc32(logits.tobytes())
        assert (trace.gaps >= 0).all()
    assert sum(told) == sum(len(trace.token_ids) for trace in traces.values())


def test_a_request_that_the_engine_gives_up_is_an_error_and_leaves_nothing_behind() -> None:
    engine = make_engine()
    engine.runner.nan_after = 3
    with pytest.raises(RuntimeError, match="not finite"):
        record(engine, [Request("a", (2, 3), 4), Request("b", (5, 6), 4)])
    assert not engine.has_unfinished_requests()


def test_a_file_gives_back_what_was_put_in() -> None:
    traces = record(make_engine(), REQUESTS)
    losses = np.array([0.5, 1.5])
    found, facts, again = unpack(pack(traces, {"steps": 3}, losses))
    assert facts == {"steps": 3} and again is not None
    np.testing.assert_array_equal(again, losses)
    assert list(found) == [request.key for request in REQUESTS]
    for key, trace in traces.items():
        assert (found[key].text, found[key].finish_reason) == (trace.text, trace.finish_reason)
        for name in ("token_ids", "candidates", "logits", "checksums"):
            np.testing.assert_array_equal(getattr(found[key], name), getattr(trace, name))
    assert unpack(pack(traces, {}, None))[2] is None


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_damaged_file_is_refused(keep: int) -> None:
    data = pack(record(make_engine(), REQUESTS), {}, None)
    with pytest.raises(ValueError):
        unpack(data[:keep])
