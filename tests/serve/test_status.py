"""The state of a server: models, probes, version, /server_info, and paths that it lacks."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

import paddle
import pytest

from fd_dsa import __version__
from fd_dsa.config import EngineConfig
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.info import INFO, engine_info, server_info
from fd_dsa.serve.state import UNRESPONSIVE_S
from tests.serve.conftest import Live, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete, error_of


def test_models(live: Live) -> None:
    models = live.client.models.list().data
    assert [m.id for m in models] == ["demo", "alias"]
    assert {m.owned_by for m in models} == {"fd_dsa"}
    first = live.http.get("/v1/models").json()["data"][0]
    assert (first["max_model_len"], first["sampling_defaults"]) == (256, {})
    assert live.client.models.retrieve("alias").id == "alias"


def test_names_with_a_slash() -> None:
    with running(FakeEngine(), names=("org/model",)) as live:
        assert live.client.models.retrieve("org/model").id == "org/model"
        assert live.client.completions.create(model="org/model", prompt="a").model == "org/model"


def test_health_follows_the_engine() -> None:
    with running(FakeEngine()) as live:
        for path in PROBES:
            answer = live.http.get(path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        live.engine.is_running = False
        chat = {"messages": [{"role": "user", "content": "a"}]}
        answers = (
            live.http.get("/health"),
            complete(live),
            live.http.post("/v1/chat/completions", json=chat),
        )
        assert all("not running" in error_of(answer, 503)["message"] for answer in answers)


def test_server_info_is_found_out_once_and_told() -> None:
    asked = []

    async def info() -> dict[str, Any]:
        asked.append(1)
        return {"engine": "fd_dsa", "commit": None}

    with running(FakeEngine(), info=info) as live:
        assert asked == []
        for _ in range(2):
            assert live.http.get("/server_info").json() == {"engine": "fd_dsa", "commit": None}
    assert asked == [1]


def test_server_info_names_what_decides_the_answers() -> None:
    config = EngineConfig(device="cpu", kv_cache_dtype="fp8_ds_mla")
    told = info_of(config, FakeEngine(max_model_len=128))
    assert told["max_model_len"] == 128
    assert (told["device"], told["dtype"], told["kv_cache_dtype"]) == (
        "cpu",
        "float32",
        "fp8_ds_mla",
    )
    assert (told["version"], told["max_num_batched_tokens"]) == (__version__, 576)
    assert told["target_inter_token_latency_ms"] == 0
    assert told["paddle"] == paddle.__version__
    assert told["batch_invariant"] is False
    names = ("chat_template", "tool_call_parser", "reasoning_parser")
    assert [told[name] for name in names] == ["a script", "none", "none"]
    assert "provider_reasons" in told and told["cudagraph_capture_sizes"] == []
    assert str(EngineConfig().model_path) not in str(told)


def info_of(config: EngineConfig, engine: FakeEngine | None = None) -> dict[str, Any]:
    """Return the answer of /server_info."""

    async def ask(question: str) -> dict[str, Any]:
        assert question == INFO
        return engine_info(config)

    engine = engine or FakeEngine()
    engine.ask = ask  # type: ignore[method-assign,assignment]
    return asyncio.run(server_info(config, engine, ServerOptions()))


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_that_of_the_working_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FD_DSA_COMMIT", raising=False)
    package = tmp_path / "fd_dsa"
    package.mkdir()
    monkeypatch.setattr("fd_dsa.__file__", str(package / "__init__.py"))

    def commit() -> str | None:
        return info_of(EngineConfig(device="cpu"))["commit"]

    assert commit() is None
    (package / "a.py").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit() == head.stdout.strip()
    (package / "a.py").write_text("2")
    assert commit() == head.stdout.strip() + "-dirty"
    # of a copy without git
    monkeypatch.setenv("FD_DSA_COMMIT", "0123abc")
    assert commit() == "0123abc"


PROBES = ("/health", "/livez", "/readyz", "/startupz")


def test_version(live: Live) -> None:
    assert live.http.get("/version").json() == {"version": __version__}


def statuses(live: Live) -> dict[str, int]:
    """Status of each probe."""
    return {path: live.http.get(path).status_code for path in PROBES}


def test_probes_while_draining() -> None:
    with running(FakeEngine()) as live:
        state = live.state
        state.draining = True
        assert statuses(live) == {"/health": 503, "/livez": 200, "/readyz": 503, "/startupz": 200}
        error = error_of(live.http.get("/readyz"), 503)
        assert (error["code"], error["type"]) == ("shutting_down", "service_unavailable_error")
        assert "shutting down" in error["message"]
        state.draining = False
        assert set(statuses(live).values()) == {200}


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


def test_probes_while_the_engine_is_silent() -> None:
    with running(FakeEngine()) as live:
        live.engine.silent_s = UNRESPONSIVE_S + 1
        assert statuses(live) == {"/health": 503, "/livez": 503, "/readyz": 503, "/startupz": 200}
        error = error_of(live.http.get("/livez"), 503)
        assert error["code"] == "engine_unresponsive" and "for 21 s" in error["message"]
        live.engine.silent_s = UNRESPONSIVE_S - 1
        assert set(statuses(live).values()) == {200}


OUT_OF_SCOPE = {
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "reranking",
    "/v1/audio/speech": "audio",
    "/v1/images/generations": "images",
    "/v1/responses/compact": "compaction of conversations",
    "/v1/responses/resp_1/cancel": "storage of responses",
}


def test_what_is_out_of_scope_is_said(live: Live) -> None:
    for path, what in OUT_OF_SCOPE.items():
        message = error_of(live.http.post(path, json={}), 404)["message"]
        assert path in message and what in message and "out of its scope" in message
        assert "/v1/chat/completions" in message
