"""Short form of the siege: few kinds of hostile requests, bounds for a busy machine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tests.serve.processes import Server, serving
from tests.soak import large_model, siege
from tests.soak.watching import Watch

pytestmark = pytest.mark.slow

STALL_S = 1.5


@pytest.mark.parametrize("name", siege.QUICK)
def test_no_kind_of_request_holds_the_others_up(name: str, tmp_path: Path) -> None:
    record = siege.run_case(name, tmp_path, siege.DEMO, siege.BUSY)
    assert record.broken(siege.BUSY) == [], record


def test_a_long_text_for_a_long_context_holds_nobody_up(tmp_path: Path) -> None:
    """The text is short enough to be tokenized, with tables of the real size."""
    large = large_model.write_model(tmp_path / "large")
    name = "8 x 200 kB of random letters"
    record = siege.run_case(name, tmp_path, siege.LARGE, siege.BUSY, str(large))
    assert record.answers == {"200": 8}
    assert record.broken(siege.BUSY) == [], record


def test_a_server_that_stands_still_is_found(tmp_path: Path) -> None:
    async def watch(server: Server) -> tuple[float, float]:
        body = siege.STREAM | {"max_tokens": 8000}
        async with Watch(server.url, server.process.pid, body) as watch:
            assert await watch.until(lambda: watch.tokens.begin is not None, 60)
            begin = time.monotonic()
            os.killpg(server.process.pid, signal.SIGSTOP)
            await asyncio.sleep(STALL_S)
            os.killpg(server.process.pid, signal.SIGCONT)
            assert watch.probes.has_stalled(STALL_S / 2)
            assert await watch.until(lambda: not watch.tokens.has_stalled(STALL_S / 2), 60)
            assert not watch.faults
            return watch.probes.longest_s(begin), watch.tokens.longest_s(begin)

    with serving(tmp_path) as server:
        probe_s, gap_s = asyncio.run(watch(server))
    assert probe_s >= STALL_S - 0.1 and gap_s >= STALL_S - 0.1


def test_a_record_names_what_is_out_of_bounds() -> None:
    good = siege.Record("a", {"200": 1}, 0.1, 0.1, 0.1, 10.0, 5.0, 1.0, 2.0, 0)
    assert good.broken(siege.FULL) == []
    bad = siege.Record("a", {"200": 1}, 0.6, 0.7, 0.1, 300.0, 60.0, 2000.0, 36.0, 1, ["why"])
    names = ("why", "health_s", "gap_s", "growth_mib", "left_mib", "log_kib", "drain_s", "status")
    for record in (bad, siege.Record("a", faults=["why"])):
        found = record.broken(siege.FULL)
        assert [name for name in names if any(name in line for line in found)] == list(names)


def test_a_server_that_does_not_start_is_found(tmp_path: Path) -> None:
    record = siege.run_case(siege.QUICK[1], tmp_path, siege.DEMO, siege.BUSY, "--no-such-flag")
    assert "unknown flag" in record.broken(siege.BUSY)[0] and record.drain_s is None
