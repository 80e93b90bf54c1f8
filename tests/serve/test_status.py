"""Probes, version, and paths that this server does not have."""

from __future__ import annotations

import pytest

from fd_dsa import __version__
from tests.serve.conftest import Live, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete, error_of

PROBES = ("/health", "/livez", "/readyz", "/startupz")


def test_version(live: Live) -> None:
    assert live.http.get("/version").json() == {"version": __version__}


def test_a_server_that_serves_says_so_on_every_probe(live: Live) -> None:
    for path in PROBES:
        answer = live.http.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def statuses(live: Live) -> dict[str, int]:
    """Status of each probe."""
    return {path: live.http.get(path).status_code for path in PROBES}


def test_probes_while_draining() -> None:
    with running(FakeEngine()) as live:
        state = live.state
        state.draining = True
        assert statuses(live) == {"/health": 503, "/livez": 200, "/readyz": 503, "/startupz": 200}
        assert error_of(live.http.get("/readyz"), 503)["code"] == "shutting_down"


def test_probes_after_a_failure_of_the_engine() -> None:
    async def blind(counter: int) -> bool:
        """A server that does not look at its engine."""
        return live.server.should_exit

    with running(FakeEngine()) as live:
        # else the server ends before it can be asked
        live.server.on_tick = blind  # type: ignore[method-assign]
        live.engine.fail_after = 1
        error_of(complete(live), 500)
        wait_until(lambda: live.engine.errored is not None)
        assert statuses(live) == {"/health": 503, "/livez": 503, "/readyz": 503, "/startupz": 200}
        assert error_of(live.http.get("/livez"), 503)["code"] == "engine_failed"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/v1/rerank", "reranking"),
        ("/v1/audio/speech", "audio"),
        ("/v1/images/generations", "images"),
        ("/v1/responses", "Responses API"),
        ("/v1/messages", "Anthropic API"),
    ],
)
def test_what_is_out_of_scope_is_said(live: Live, path: str, what: str) -> None:
    message = error_of(live.http.post(path, json={}), 404)["message"]
    assert path in message and what in message and "out of its scope" in message
    assert "/v1/chat/completions" in message
