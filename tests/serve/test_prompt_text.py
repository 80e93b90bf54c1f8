"""Texts of requests and their tokens: what is too long is refused, and the rest holds nobody up."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tokenizers
from tokenizers.models import WordLevel

from fd_dsa.chat.json_text import NOT_UNICODE
from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.info import log_chat
from tests.chat.recorded import TOOLS
from tests.engine import byte_model
from tests.engine.fakes import make_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete, error_of
from tests.serve.test_tool_calls import RENDERERS, V32, engine_of

CONTEXT = "; this model's maximum context length is {} tokens"
TOO_LONG = CONTEXT.replace("; ", "; the prompt is too long, ")
"""Ends of messages by which clients recognize a conversation that they have to shorten."""


@pytest.fixture(scope="module")
def short() -> Iterator[Live]:
    """A server that takes texts of up to 100 bytes."""
    with running(FakeEngine(max_model_len=4096), max_prompt_bytes=100) as live:
        yield live


def chat(*contents: str) -> dict[str, Any]:
    """A conversation of the user's."""
    return {"messages": [{"role": "user", "content": content} for content in contents]}


def assistant(**fields: Any) -> dict[str, Any]:
    """A conversation with further fields in a message of the assistant's."""
    user = {"role": "user", "content": ""}
    return {"messages": [user, {"role": "assistant", "content": "", **fields}, user]}


@pytest.mark.parametrize(
    ("path", "body", "field", "num_bytes"),
    [
        ("/v1/completions", {"prompt": "a" * 101}, "prompt", 101),
        ("/v1/completions", {"prompt": ["a", "é" * 51]}, "prompt[1]", 102),
        ("/tokenize", {"prompt": "漢" * 34}, "prompt", 102),
        ("/tokenize", chat("a" * 60, "b" * 60), "messages", 120),
        ("/v1/chat/completions", chat("a" * 60, "b" * 60), "messages", 120),
        ("/v1/chat/completions", assistant(reasoning_content="a" * 101), "messages", 101),
        ("/v1/chat/completions", assistant(name=[{"deep": "a" * 101}]), "messages", 101),
        # the messages alone would fit
        ("/v1/chat/completions", chat("a" * 50, "b" * 48), "messages", 111),
    ],
)
def test_a_text_of_too_many_bytes_names_both_numbers(
    short: Live, path: str, body: dict[str, Any], field: str, num_bytes: int
) -> None:
    error = error_of(short.http.post(path, json=body), 400)
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert error["message"].startswith(f"{field}: has {num_bytes} bytes of text; allowed are")
    assert "at most 100, the --max-prompt-bytes" in error["message"]
    assert error["message"].endswith(TOO_LONG.format(4096))
    assert short.http.post("/tokenize", json={"prompt": "a" * 100}).status_code == 200


def test_a_template_that_writes_too_much_names_the_limit(short: Live) -> None:
    # its markup is longer than the messages
    body = chat(*["a"] * 99)
    error = error_of(short.http.post("/v1/chat/completions", json=body), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert (
        "would make a prompt of more than 300 characters; allowed are at most 100"
        in error["message"]
    )
    assert "bytes, the --max-prompt-bytes of this server; shorten" in error["message"]
    assert error["message"].endswith(TOO_LONG.format(4096))


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_clients_recognize_a_prompt_beyond_the_context(live: Live, path: str) -> None:
    body = {**chat("a" * 300), "max_tokens": 5}
    if path == "completions":
        body = {"prompt": "a" * 300}
    elif path == "responses":
        body = {"input": "a" * 300}
    answer = live.http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].endswith(TOO_LONG.format(256))


def test_clients_recognize_an_output_beyond_the_context(live: Live) -> None:
    error = error_of(complete(live, prompt=[1] * 200, max_tokens=57), 400)
    assert error["message"].endswith(CONTEXT.format(256))
    assert "too long" not in error["message"]


def test_tools_are_texts_of_the_prompt_too() -> None:
    function = {"name": "f", "description": "a" * 4000, "parameters": {"title": "b"}}
    body = {**chat("a"), "tools": [{"type": "function", "function": function}]}
    with running(engine_of(V32), max_prompt_bytes=4000) as live:
        error = error_of(live.http.post("/v1/chat/completions", json=body), 400)
        assert error["param"] == "tools"
        assert "tools: has 4052 bytes of text; allowed are at most 4000" in error["message"]
        unused = {**body, "tool_choice": "none"}
        assert live.http.post("/v1/chat/completions", json=unused).status_code == 200


HELLO = {"role": "user", "content": "Hi"}
NO_UNICODE = {"role": "user", "content": "\ud800"}
FUNCTION = {"name": "f", "parameters": {"properties": {"a": {"const": "\ud800"}}}}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("chat/completions", {"messages": [HELLO, NO_UNICODE]}, "messages[1]"),
        ("responses", {"input": [HELLO, NO_UNICODE]}, "input[1]"),
        ("responses", {"input": "Hi", "instructions": "\ud800"}, "instructions"),
        ("responses", {"input": "Hi", "tools": [{"type": "function", **FUNCTION}]}, "tools[0]"),
        ("messages", {"messages": [HELLO, NO_UNICODE], "max_tokens": 5}, "messages[1]"),
        ("messages", {"messages": [HELLO], "max_tokens": 5, "system": "\ud800"}, "system"),
    ],
)
@pytest.mark.parametrize("choice", [None, "required"])
def test_a_text_that_is_no_unicode_is_named(
    path: str, body: dict[str, Any], field: str, choice: str | None
) -> None:
    if choice is not None and "tools" in body:
        body = {**body, "tool_choice": choice}
    # json.dumps escapes the lone surrogate, which a client library would not send
    content, headers = json.dumps(body), {"Content-Type": "application/json"}
    with running(engine_of(V32)) as live:
        answer = live.http.post(f"/v1/{path}", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"{field}: {NOT_UNICODE}"


def test_messages_that_are_too_long_reach_no_template() -> None:
    renderer = Mock(source="plain", origin="a script")
    with running(FakeEngine(renderer=renderer), max_prompt_bytes=100) as live:
        error = error_of(live.http.post("/v1/chat/completions", json=chat("a" * 101)), 400)
        assert "--max-prompt-bytes" in error["message"]
    renderer.render.assert_not_called()


def test_by_default_a_text_has_sixteen_bytes_for_each_token(live: Live) -> None:
    error = error_of(complete(live, prompt="a" * (16 * 256 + 1)), 400)
    assert "has 4097 bytes of text; allowed are at most 4096" in error["message"]
    error = error_of(complete(live, prompt="a" * 16 * 256), 400)
    assert "prompt has 4097 tokens, max_model_len is 256" in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_text_of_too_many_tokens_is_not_counted_to_its_end(path: str) -> None:
    with running(threaded(byte_model.make_engine()), max_prompt_bytes=10**6) as live:
        error = error_of(live.http.post(path, json={"prompt": "word " * 100_000}), 400)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert "or more tokens, max_model_len is 512" in error["message"]


def test_probes_are_answered_while_a_long_text_is_tokenized() -> None:
    """With a tokenizer that is real: only its GIL shows what a thread is worth."""
    with running(threaded(byte_model.make_engine()), max_prompt_bytes=1 << 22) as live:
        # one word, so that it cannot be cut
        body = {"prompt": "a" * 1_000_000}
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(live.http.post("/tokenize", json=body))
        )
        thread.start()
        num_probes = 0
        while not answers:
            assert live.http.get("/health").status_code == 200
            num_probes += 1
        thread.join()
        assert "1000000 tokens, max_model_len is 512" in error_of(answers[0], 400)["message"]
        assert num_probes >= 5


def test_bad_words_are_not_tokenized_by_the_engines_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def recorded(name: str) -> Any:
        original = getattr(Tokenizer, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            threads.append(threading.current_thread().name)
            return original(*args, **kwargs)

        return record

    for name in ("encode", "encode_all"):
        monkeypatch.setattr(Tokenizer, name, recorded(name))
    with running(threaded(make_engine())) as live:
        fields = {"prompt": [[5, 6], [7]], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        plain = [choice["text"] for choice in complete(live, **fields).json()["choices"]]
        words = [plain[0][3:6], plain[1][5:6]]
        assert not threads
        choices = complete(live, **fields, bad_words=words).json()["choices"]
        assert not any(word in choice["text"] for word in words for choice in choices)
        assert len(threads) == 1 and "fd_dsa-engine" not in threads[0]


CHAT = [{"role": "user", "content": "Hi"}]


def tokenize(live: Live, **fields: Any) -> Any:
    """POST to /tokenize."""
    return live.http.post("/tokenize", json=fields)


def test_a_prompt_is_what_a_completion_begins_with(live: Live) -> None:
    told = tokenize(live, prompt="añ").json()
    assert told == {"count": 4, "max_model_len": 256, "tokens": [256, 97, 195, 177]}
    usage = live.http.post("/v1/completions", json={"prompt": "añ"}).json()["usage"]
    assert usage["prompt_tokens"] == told["count"]
    assert tokenize(live, prompt="a", add_special_tokens=False).json()["tokens"] == [97]
    assert tokenize(live, prompt="").json()["tokens"] == []


def test_messages_are_what_a_chat_completion_begins_with(live: Live) -> None:
    told = tokenize(live, messages=CHAT, model="alias").json()
    assert bytes(told["tokens"]) == b"user:Hi\n>"
    usage = live.http.post("/v1/chat/completions", json={"messages": CHAT}).json()["usage"]
    assert usage["prompt_tokens"] == told["count"]
    bare = tokenize(live, messages=CHAT, add_generation_prompt=False).json()["tokens"]
    assert bytes(bare) == b"user:Hi\n"


def test_tools_and_switches_change_the_prompt_as_in_a_chat_completion() -> None:
    engine = FakeEngine(renderer=RENDERERS["deepseek_v32"], max_model_len=4096)
    with running(engine) as live:
        prompts = set()
        for more in ({}, {"tools": TOOLS}, {"chat_template_kwargs": {"thinking": True}}):
            fields = {"messages": CHAT, **more}
            told = tokenize(live, **fields).json()
            answer = live.http.post("/v1/chat/completions", json=fields).json()
            assert answer["usage"]["prompt_tokens"] == told["count"]
            prompts.add(bytes(told["tokens"]))
        assert len(prompts) == 3


def test_each_token_as_a_text(live: Live) -> None:
    told = tokenize(live, prompt="aé", return_token_strs=True).json()
    assert told["token_strs"] == ["<s>", "a", "�", "�"]


def test_there_and_back(live: Live) -> None:
    for text in ("", "Hello wörld 🙂"):
        tokens = tokenize(live, prompt=text, add_special_tokens=False).json()["tokens"]
        assert live.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    told = live.http.post("/detokenize", json={"tokens": [256, 97]}).json()
    assert told == {"prompt": "<s>a"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": CHAT}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ({"messages": []}, "prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_cannot_be_tokenized(live: Live, fields: dict[str, Any], param: str) -> None:
    assert error_of(tokenize(live, **fields), 400)["param"].startswith(param)


@pytest.mark.parametrize(
    ("tokens", "param"),
    [
        *((tokens, "tokens") for tokens in ([257], [-1], "a", None)),
        *((tokens, "tokens[0]") for tokens in ([10**40], ["a"], [1.5], [True], [[1]])),
    ],
)
def test_tokens_that_are_none(live: Live, tokens: Any, param: str) -> None:
    answer = live.http.post("/detokenize", json={"tokens": tokens})
    error = error_of(answer, 400)
    assert error["param"] == param
    assert len(error["message"]) < 200


def test_ids_after_a_gap_of_the_vocabulary_have_a_text() -> None:
    vocabulary = {"a": 0, "b": 1, "z": 9}
    engine = FakeEngine()
    engine.tokenizer = Tokenizer(tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="a")))
    with running(engine) as live:
        told = live.http.post("/detokenize", json={"tokens": [1, 9]}).json()
        assert told == {"prompt": "b z"}
        error = error_of(live.http.post("/detokenize", json={"tokens": [10]}), 400)
        assert error["message"] == "tokens: got 10; token ids of this model are 0 to 9"


def test_other_models_are_not_there(live: Live) -> None:
    error_of(tokenize(live, prompt="a", model="gpt-4"), 404)
    error_of(live.http.post("/detokenize", json={"tokens": [1], "model": "gpt-4"}), 404)


TEMPLATE = "{% for m in messages %}{{ m.content }}|{% endfor %}<think>"


def test_only_the_template_writes_control_tokens() -> None:
    think, text = byte_model.TOKENIZER.encode("<think>"), "<think>é\ue123"
    assert len(think) == 1
    for allows in (False, True):
        flags = {"trust_request_chat_template": True, "allow_special_tokens_in_text": allows}
        with running(threaded(byte_model.make_engine()), **flags) as live:
            chat = {"messages": [{"role": "user", "content": text}], "chat_template": TEMPLATE}
            told = tokenize(live, **chat).json()["tokens"]
            assert told.count(*think) == 1 + allows
            assert live.http.post("/detokenize", json={"tokens": told}).json() == {
                "prompt": f"{text}|<think>"
            }
            answer = live.http.post("/v1/chat/completions", json={**chat, "max_tokens": 1}).json()
            assert answer["usage"]["prompt_tokens"] == len(told)
            # the prompt of a completion is the caller's own
            assert tokenize(live, prompt=text).json()["tokens"].count(*think) == 1


def test_a_continued_text_does_not_open_the_reasoning() -> None:
    """Only a marker that counts does."""
    template = "{{ messages[0].content }}"
    flags = {"trust_request_chat_template": True, "reasoning_parser": "deepseek_v3"}
    with running(threaded(byte_model.make_engine()), **flags) as live:
        for content, is_reasoning in (
            ("a<think>", False),
            ("<think>", True),
            (" \n<think>a", True),
            ("<think>a</think>b", False),
            ("</think><think>", False),
        ):
            body = {
                "messages": [{"role": "assistant", "content": content}],
                "chat_template": template,
                "continue_final_message": True,
                "max_tokens": 4,
                "ignore_eos": True,
            }
            (choice,) = live.http.post("/v1/chat/completions", json=body).json()["choices"]
            assert bool(choice["message"].get("reasoning_content")) == is_reasoning, choice


def test_variables_of_any_name_reach_the_template() -> None:
    names = {"renderer": "a", "control": "b"}
    with running(threaded(byte_model.make_engine()), trust_request_chat_template=True) as live:
        fields = {
            "messages": CHAT,
            "chat_template": "{{ renderer }}{{ control }}",
            "chat_template_kwargs": names,
        }
        tokens = tokenize(live, **fields).json()["tokens"]
        assert byte_model.TOKENIZER.decode(tokens) == "ab"
        allowed = {"allow_special_tokens_in_text": True}
        error = error_of(tokenize(live, **{**fields, "chat_template_kwargs": allowed}), 400)
        assert "allow_special_tokens_in_text" in error["message"]


def test_a_broken_template_of_the_folder_disables_chat_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(demo_model_path() / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}\n\n{% unknown %}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    log_chat(tokenizer, ServerOptions())
    reason = "chat template of chat_template.jinja: line 3 is no valid Jinja"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"chat: none, {reason}")
    with running(threaded(make_engine(tokenizer=tokenizer, vocab_size=5000))) as live:
        error = error_of(live.http.post("/v1/chat/completions", json={"messages": CHAT}), 400)
        assert error["message"].startswith(f"messages: {reason}")
        assert complete(live).status_code == 200
