"""The OpenAPI document against real answers: whole, streamed and failed ones of every route."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from fd_dsa.config import EngineConfig
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.guard import OPEN_PATHS
from fd_dsa.serve.info import INFO, engine_info, server_info
from fd_dsa.serve.openapi import STREAMS
from fd_dsa.startup.build import build_engine
from tests.chat.recorded import TOOLS
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running, stream_data
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_messages import OWN_TOOLS
from tests.serve.test_tool_calls import HI, V32, engine_of

SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
CHAT = {"messages": HI, **SHORT}
ON = {"type": "enabled", "budget_tokens": 1024}
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


Ask = Callable[["Checker", Live], None]


class Checker:
    """Validates answers, and remembers which properties of the schemas they had.

    The schemas are closed: an answer with a property that its schema lacks is refused.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.paths = document["paths"]
        self.components = {"components": document["components"]}
        self.seen: set[tuple[str, str]] = set()
        self._asked: set[Ask] = set()
        for schema in document["components"]["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)

    def once(self, ask: Ask, demo: Live) -> None:
        """Ask and check, unless an earlier test has."""
        if ask not in self._asked:
            ask(self, demo)
            self._asked.add(ask)

    def check(self, path: str, method: str, status: int, kind: str, value: Any) -> None:
        """Validate an answer of a route against the schema of its status and content type."""
        answers = self.paths[path][method]["responses"]
        answer = answers["200" if status == 200 else "default"]
        schema = answer["content"][kind]["schema"]
        errors = list(self._validator(schema).iter_errors(value))
        assert not errors, (path, kind, value, errors[0].message, errors[0].context)
        self._see(schema, value)

    def unseen(self) -> set[tuple[str, str]]:
        """Properties of answers that no checked answer had."""
        answers = [
            content["schema"]
            for operations in self.paths.values()
            for operation in operations.values()
            for answer in operation["responses"].values()
            for content in answer["content"].values()
        ]
        names: set[str] = set()
        while answers:
            schema = answers.pop()
            for part in _parts(schema):
                name = part.rpartition("/")[2]
                if name not in names:
                    names.add(name)
                    answers.append(self._named(name))
        declared = {
            (name, key) for name in names for key in self._named(name).get("properties", {})
        }
        return declared - self.seen

    def _named(self, name: str) -> dict[str, Any]:
        schema: dict[str, Any] = self.components["components"]["schemas"][name]
        return schema

    def _validator(self, schema: dict[str, Any]) -> Draft202012Validator:
        return Draft202012Validator({**self.components, **schema})

    def _see(self, schema: dict[str, Any], value: Any) -> None:
        """Remember the properties of a value that fits the schema."""
        name = schema.get("$ref", "").rpartition("/")[2]
        if name:
            schema = self._named(name)
        for branch in schema.get("anyOf", ()):
            if self._validator(branch).is_valid(value):
                self._see(branch, value)
        if isinstance(value, list):
            for entry in value:
                self._see(schema.get("items", {}), entry)
        if isinstance(value, dict):
            for key, entry in value.items():
                own = schema.get("properties", {}).get(key)
                if own is not None:
                    self.seen.add((name, key))
                more = schema.get("additionalProperties")
                self._see(own or (more if isinstance(more, dict) else {}), entry)


def _parts(schema: Any) -> Iterator[str]:
    """All references in a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for entry in schema.values():
            yield from _parts(entry)
    elif isinstance(schema, list):
        for entry in schema:
            yield from _parts(entry)


@pytest.fixture(scope="module")
def checker() -> Checker:
    """The document of a server, the same for all servers without keys."""
    with running(FakeEngine()) as live:
        return Checker(live.http.get("/openapi.json").json())


def post(checker: Checker, live: Live, path: str, status: int = 200, **body: Any) -> httpx.Response:
    """Send a request and validate its answer, or each event of its stream."""
    answer = live.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    kind = answer.headers["content-type"].partition(";")[0]
    if kind != "text/event-stream":
        checker.check(path, "post", answer.status_code, kind, answer.json())
        return answer
    for data in stream_data(answer.text):
        if data != "[DONE]":
            checker.check(path, "post", 200, kind, json.loads(data))
    return answer


@pytest.fixture(scope="module")
def demo(checker: Checker) -> Iterator[Live]:
    """The demo model, with drafts, scores, the indexer's selections and few blocks."""
    blocks = {"block_size": 16, "num_gpu_blocks_override": 10, "kv_offload_bytes": "64M"}
    config = EngineConfig(max_model_len=128, max_num_seqs=2, index_topk=8, **blocks)
    engine = threaded(build_engine(config))

    answer = engine.ask

    async def ask(question: str, argument: Any = None) -> Any:
        # of the engine's own process, which this one has none of
        return engine_info(config) if question == INFO else await answer(question, argument)

    engine.ask = ask  # type: ignore[method-assign]
    options = ServerOptions()
    with running(engine, info=lambda: server_info(config, engine, options)) as live:
        yield live


def ask_demo(checker: Checker, demo: Live) -> None:
    """Whole and streamed answers with all that the demo model can show."""
    shown = {"return_token_ids": True, "return_topk_positions": True}
    # a stream has no scores of its prompt
    for more in ({"prompt_logprobs": 1}, WITH_USAGE):
        post(checker, demo, "/v1/chat/completions", **CHAT, **more)
        post(checker, demo, "/v1/chat/completions", **CHAT, n=2, logprobs=True, **shown, **more)
        post(checker, demo, "/v1/chat/completions", **CHAT, top_logprobs=2, logprobs=True, **more)
        text = {"prompt": ["Once upon", "a time"], **SHORT}
        post(checker, demo, "/v1/completions", **text, **more)
        post(checker, demo, "/v1/completions", **text, n=2, logprobs=2, echo=True, **shown, **more)
    post(checker, demo, "/v1/chat/completions", **CHAT, stream=True)
    post(checker, demo, "/v1/completions", prompt="Once", **SHORT, stream=True)
    for stream in (False, True):
        asked = {"input": "Hi", "stream": stream, "temperature": 0}
        include = ["message.output_text.logprobs"]
        scored = {"include": include, "top_logprobs": 1, "max_output_tokens": 9}
        post(checker, demo, "/v1/responses", **asked, **scored)
        post(checker, demo, "/v1/responses", **asked, max_output_tokens=1)
        post(checker, demo, "/v1/messages", messages=HI, max_tokens=1, stream=stream)
    post(checker, demo, "/v1/messages/count_tokens", messages=HI)
    post(checker, demo, "/v1/responses/input_tokens", input="Hi")
    post(checker, demo, "/tokenize", prompt="Hi", return_token_strs=True)
    post(checker, demo, "/detokenize", tokens=[5, 6])


def ask_again(checker: Checker, demo: Live) -> None:
    """A prompt whose blocks were evicted in between."""
    prompts = [[token] * length for token, length in ((5, 40), (6, 120), (7, 120), (5, 40))]
    for prompt in prompts:
        answer = post(checker, demo, "/v1/completions", prompt=prompt, temperature=0, max_tokens=1)
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert 0 < details["host_cached_tokens"] <= details["cached_tokens"] == 32


def ask_recorded(checker: Checker, _: Live) -> None:
    """Reasoning and calls of tools, as models write them."""
    with running(engine_of(V32)) as live:
        for stream in (False, True):
            chat = {"messages": HI, "tools": TOOLS, "reasoning_effort": "high"}
            post(checker, live, "/v1/chat/completions", **chat, stream=stream)
            asked = {"input": "Hi", "tools": FUNCTIONS, "reasoning": {"effort": "high"}}
            post(checker, live, "/v1/responses", **asked, stream=stream)
            own = {"messages": HI, "tools": OWN_TOOLS, "thinking": ON, "max_tokens": 2048}
            post(checker, live, "/v1/messages", **own, stream=stream)


def ask_reports(checker: Checker, demo: Live) -> None:
    """Models, probes, versions, limits and metrics."""
    gets = [path for path, operations in checker.paths.items() if "get" in operations]
    assert len(gets) == 9
    for path in gets:
        answer = demo.http.get(path.replace("{name}", "demo"))
        kind = answer.headers["content-type"].partition(";")[0]
        value = answer.text if kind == "text/plain" else answer.json()
        checker.check(path, "get", answer.status_code, kind, value)
        assert answer.status_code == 200


def ask_wrongly(checker: Checker, _: Live) -> None:
    """Refusals of every route, and streams that fail."""
    posts = [path for path, operations in checker.paths.items() if "post" in operations]
    with running(FakeEngine()) as live:
        for path in posts:
            post(checker, live, path, 400, model=5)
        post(checker, live, "/v1/messages", 400, messages=HI, max_tokens=9, thread=[])
        answer = live.http.get("/v1/models/none")
        checker.check("/v1/models/{name}", "get", 404, "application/json", answer.json())
    for path in STREAMS:
        with running(FakeEngine()) as live:
            # as a client sees it: the stream has begun
            live.engine.fail_after, live.engine.fails_alone = 2, True
            body: dict[str, Any] = {
                "/v1/completions": {"prompt": "Hi"},
                "/v1/responses": {"input": "Hi"},
            }.get(path, {"messages": HI, "max_tokens": 9})
            answer = post(checker, live, path, **body, stream=True)
            assert "internal error" in answer.text


ASKING = (ask_demo, ask_again, ask_recorded, ask_reports, ask_wrongly)


@pytest.mark.parametrize("ask", ASKING, ids=lambda ask: ask.__name__)
def test_answers_are_as_the_document_says(checker: Checker, demo: Live, ask: Ask) -> None:
    checker.once(ask, demo)


def test_every_property_of_the_document_was_in_an_answer(checker: Checker, demo: Live) -> None:
    for ask in ASKING:
        checker.once(ask, demo)
    assert checker.unseen() == set()


def test_locks_are_only_where_a_key_is_asked_for() -> None:
    for keys in ((), ("secret",)):
        with running(FakeEngine(), api_key=keys) as live:
            document = live.http.get("/openapi.json").json()
            locks = document["components"].get("securitySchemes", {})
            assert set(locks) == ({"bearer", "x-api-key"} if keys else set())
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    refused = live.http.request(method, path, json={}).status_code == 401
                    assert refused == (bool(keys) and path not in OPEN_PATHS)
                    assert ("security" in operation) == refused, path
                    for lock in operation.get("security", ()):
                        (kind,) = lock
                        header = {
                            "bearer": {"Authorization": "Bearer secret"},
                            "x-api-key": {"x-api-key": "secret"},
                        }[kind]
                        answer = live.http.request(method, path, json={}, headers=header)
                        assert answer.status_code != 401, (path, kind)
