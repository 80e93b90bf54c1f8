"""/v1/models and /health."""

from __future__ import annotations

from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import error_of


def test_models(live: Live) -> None:
    models = live.client.models.list().data
    assert [m.id for m in models] == ["demo", "alias"]
    assert {m.owned_by for m in models} == {"fd_dsa"}
    assert live.http.get("/v1/models").json()["data"][0]["max_model_len"] == 256
    assert live.client.models.retrieve("alias").id == "alias"


def test_names_with_a_slash() -> None:
    with running(FakeEngine(), names=("org/model",)) as live:
        assert live.client.models.retrieve("org/model").id == "org/model"
        assert live.client.completions.create(model="org/model", prompt="a").model == "org/model"


def test_api_page_describes_the_routes(live: Live) -> None:
    assert live.http.get("/docs").status_code == 200
    paths = live.http.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health"} <= set(paths)


def test_health_follows_the_engine() -> None:
    with running(FakeEngine()) as live:
        answer = live.http.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        live.engine.is_running = False
        for path in ("/health", "/v1/completions", "/v1/chat/completions"):
            if path == "/health":
                answer = live.http.get(path)
            else:
                body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
                answer = live.http.post(path, json=body)
            assert "not running" in error_of(answer, 503)["message"]


def test_health_while_draining_and_after_a_failure() -> None:
    with running(FakeEngine()) as live:
        state = live.server.config.app.state.server  # type: ignore[union-attr]
        state.draining = True
        error = error_of(live.http.get("/health"), 503)
        assert error["type"] == "service_unavailable_error"
        assert "shutting down" in error["message"]
        state.draining = False
        assert live.http.get("/health").status_code == 200
