"""Flags of the command line, of variables and of a file, and which of them has precedence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.serve.flag_sources import parse_args, unused_variables
from fd_dsa.serve.flags import build_parser


@pytest.fixture(autouse=True)
def _without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FD_DSA_"):
            monkeypatch.delenv(name)


def file(tmp_path: Path, text: str) -> str:
    """Path of a YAML file."""
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_goes_before_variables_before_the_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "port: 1\nhost: file\nmax_num_seqs: 7\nserved-model-name: [a, b]\n")
    monkeypatch.setenv("FD_DSA_PORT", "2")
    monkeypatch.setenv("FD_DSA_HOST", "variable")
    args = parse_args(["--config", path, "--port", "3"])
    assert (args.port, args.host, args.max_num_seqs) == (3, "variable", 7)
    for text, size in (("32M", 32 << 20), ("4096", 4096), ("1GiB", 1 << 30)):
        assert parse_args(["--max-body-size", text]).max_body_size == size
    assert args.served_model_name == ["a", "b"]
    assert args.shutdown_timeout == 30
    assert args.given == {"config", "port", "host", "max_num_seqs", "served_model_name"}


SWITCHES = (
    *(
        "download",
        "dry-run",
        "trust-request-chat-template",
        "allow-special-tokens-in-text",
        "disable-ui",
        "enable-prefix-caching",
    ),
    *("async-scheduling", "enable-chunked-prefill", "enforce-eager"),
    *("allow-unknown-config-fields", "enable-expert-parallel", "log-requests"),
    "log-json",
)
VALUES: dict[str, Any] = {
    **dict.fromkeys(("model", "tokenizer", "chat-template", "kv-cache-dtype"), "a/name"),
    **dict.fromkeys(("index-topk", "seed", "port", "max-concurrency", "block-size"), 3),
    **dict.fromkeys(("num-gpu-blocks-override", "max-model-len", "max-num-seqs"), 4),
    **dict.fromkeys(("max-num-batched-tokens", "tensor-parallel-size"), 5),
    **dict.fromkeys(("shutdown-timeout", "gpu-memory-utilization", "sse-ping-interval"), 2.5),
    "target-inter-token-latency-ms": 2.5,
    **{key: ["one", "two"] for key in ("served-model-name", "api-key", "allowed-host")},
    "cudagraph-capture-sizes": [1, 8],
    "cudagraph-prompt-sizes": [32, 64],
    "data-parallel-size": 2,
    "generation-config": "vllm",
    "load-format": "dummy",
    **dict.fromkeys(("max-body-size", "max-prompt-bytes"), "2M"),
    **dict.fromkeys(("max-body-values", "max-answer-scores"), 6),
    **dict.fromkeys(("max-connections", "timeout-keep-alive"), 9),
    **dict.fromkeys(("kv-cache-memory-bytes", "kv-offload-bytes"), "8G"),
    "speculative-config": '{"method": "ngram"}',
    "host": "0.0.0.0",
    "device": "cpu",
    "dtype": "float32",
    "engine": "embedded",
    "log-level": "debug",
    "tool-call-parser": "glm47",
    "reasoning-parser": "none",
    **dict.fromkeys(SWITCHES, True),
}


def test_every_flag_has_one_value_from_all_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {option for action in build_parser()._actions for option in action.option_strings}
    flags = {option.removeprefix("--") for option in options if option.startswith("--")}
    negated = {"no-async-scheduling", "no-enable-prefix-caching", "no-enable-chunked-prefill"}
    assert flags - negated - {"help", "version", "config"} == VALUES.keys()
    for name, value in VALUES.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words = [f"--{name}", *map(str, values)]
        if name in ("served-model-name", "api-key", "allowed-host"):
            words = [f"--{name}={one}" for one in values]
        on_line = vars(parse_args(words))
        with monkeypatch.context() as patch:
            text = "1" if value is True else ",".join(map(str, values))
            patch.setenv(f"FD_DSA_{name.upper().replace('-', '_')}", text)
            assert vars(parse_args([])) == on_line, name
        path = file(tmp_path, json.dumps({name: value}))
        in_file = vars(parse_args(["--config", path]))
        assert in_file.pop("config") == path
        assert in_file.pop("given") - {"config"} == on_line.pop("given") != set()
        assert in_file == on_line, name


def test_lists_replace_and_do_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, "api-key: [one]\nserved_model_name: single\nport: 9000")
    monkeypatch.setenv("FD_DSA_CONFIG", path)
    assert parse_args([]).port == 9000
    assert parse_args(["--config", path]).api_key == ["one"]
    assert parse_args(["--config", path]).served_model_name == ["single"]
    monkeypatch.setenv("FD_DSA_API_KEY", "two, three,")
    assert parse_args(["--config", path]).api_key == ["two", "three"]
    assert parse_args(["--config", path, "--api-key", "four"]).api_key == ["four"]


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("0", False), ("False", False)]
)
def test_switches_of_variables(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("FD_DSA_ENABLE_PREFIX_CACHING", text)
    monkeypatch.setenv("FD_DSA_LOG_JSON", text)
    args = parse_args([])
    assert (args.enable_prefix_caching, args.log_json) == (value, value)


def test_what_is_empty_says_nothing_and_a_switch_can_be_turned_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_DSA_ALLOWED_HOST", "")
    args = parse_args(["--config", file(tmp_path, "# nothing\n")])
    assert not hasattr(args, "allowed_host") and args.given == {"config"}
    path = file(tmp_path, "enable-prefix-caching: false\nlog-requests: true\nseed: null")
    args = parse_args(["--config", path])
    assert (args.enable_prefix_caching, args.log_requests, hasattr(args, "seed")) == (
        False,
        True,
        False,
    )
    assert parse_args(["--config", path, "--enable-prefix-caching"]).enable_prefix_caching is True


@pytest.mark.parametrize("flag", ["api-key", "served-model-name"])
@pytest.mark.parametrize("text", ["0123", "1.10", "1_000", "0x1f", "1e5", "2026-11-30", "'0123'"])
def test_a_text_in_a_file_is_the_text_of_the_command_line(
    tmp_path: Path, flag: str, text: str
) -> None:
    """YAML would make other numbers of some of them: a server with another key than written."""
    written = parse_args(["--config", file(tmp_path, f"{flag}: {text}")])
    typed = parse_args([f"--{flag}", text.strip("'")])
    assert vars(written) | {"config": None, "given": None} == vars(typed) | {
        "config": None,
        "given": None,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no-enable-prefix-caching: true", ["--no-enable-prefix-caching"]),
        ("no_enable_prefix_caching: false", ["--enable-prefix-caching"]),
        (
            "speculative-config: {method: ngram, num_speculative_tokens: 3}",
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
        ),
        ("speculative-config:\n  method: ngram", ["--speculative-config", '{"method": "ngram"}']),
    ],
)
def test_a_file_of_vllm_has_the_values_of_the_command_line(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    written, typed = vars(parse_args(["--config", file(tmp_path, text)])), vars(parse_args(words))
    assert written | {"config": None, "given": None} == typed | {"config": None, "given": None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: 1\nport: 2", ["the key 'port' is there twice"]),
        ("max-model-length: 5", ["unknown key 'max-model-length'; did you mean max-model-len?"]),
        ("max_modle_len: 5", ["unknown key 'max_modle_len'; did you mean max-model-len?"]),
        ("zzzz: 5", ["unknown key 'zzzz'; keys are flags"]),
        ("config: other.yaml", ["unknown key 'config'; keys are flags"]),
        ("port: http", ["--port: got 'http'; must be 0 to 65535"]),
        ("port: [1, 2]", ["--port: got a list, allowed: one value"]),
        ("port: true", ["--port: got bool, allowed: a text, a number"]),
        ("host: {a: b}", ["--host: got dict, allowed: a text"]),
        ("api-key: []", ["--api-key: got nothing, allowed: a text"]),
        ("api_key:", ["--api-key: got nothing, allowed: a text"]),
        ("api-key: ''", ["--api-key: allowed is a text of one character or more"]),
        ("log-json: maybe", ["--log-json: got 'maybe', allowed: true, false"]),
        ("max-num-seqs: 1\nmax_num_seqs: 2", ["is there twice"]),
        ("port: 1\n'port': 2", ["the key 'port' is there twice"]),
        ("speculative-config: {method: mtp, method: ngram}", ["the key 'method' is there twice"]),
        (
            "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9 if n else 1}]\n" for n in range(20)),
            ["has more than 100000 values"],
        ),
        ("speculative-config: {a: [{1: x, '1': y}]}", ["the key '1' is there twice"]),
        ("[1, 2]", ["holds a list"]),
        (
            "speculative-config: &a {method: *a}",
            ["-config: cannot be written as JSON"],
        ),
        (
            "speculative-config: {2020-01-01: 1}",
            ["-config: cannot be written as JSON"],
        ),
        ("a: [", ["cannot be read"]),
        ("port: 80\n\tx: 1", ["cannot be read"]),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", path])
    said = str(caught.value)
    assert said.startswith("--config: ") and path in said and "\n" not in said
    assert all(word in said for word in words), said
    with pytest.raises(ConfigError, match=r"none\.yaml' cannot be read: No such file[^/]*$"):
        parse_args(["--config", str(tmp_path / "none.yaml")])


def test_files_without_an_end_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"^--config: \S+/pipe: is a pipe without a writer"):
        parse_args(["--config", str(tmp_path / "pipe")])
    with pytest.raises(ConfigError, match=r"^--config: /dev/zero: has more bytes, allowed: at"):
        parse_args(["--config", "/dev/zero"])


def test_an_error_of_a_file_shows_no_line_of_it(tmp_path: Path) -> None:
    path = file(tmp_path, "api-key: [secret\nport: 80: 90\n")
    with pytest.raises(ConfigError, match=rf'in "{path}", line 2, column') as caught:
        parse_args(["--config", path])
    assert "secret" not in str(caught.value) and "90" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("FD_DSA_PORT", "http", "FD_DSA_PORT: --port: got 'http'; must be 0 to 65535"),
        ("FD_DSA_LOG_JSON", "maybe", "FD_DSA_LOG_JSON: got 'maybe', allowed: 0, 1"),
        ("FD_DSA_MAX_BODY_SIZE", "huge", "FD_DSA_MAX_BODY_SIZE: --max-body-size: got 'huge'"),
        ("FD_DSA_MAX_CONCURRENCY", "0", "--max-concurrency: got '0'; must be a whole number"),
        ("FD_DSA_API_KEY", "one,two three", "FD_DSA_API_KEY: --api-key: allowed is a text of one"),
        ("FD_DSA_API_KEY", "", "FD_DSA_API_KEY: --api-key: allowed is a text of one"),
        ("FD_DSA_API_KEY", " ", "FD_DSA_API_KEY: --api-key: allowed is a text of one"),
        ("FD_DSA_API_KEY", "a,,b", "FD_DSA_API_KEY: --api-key: allowed is a text of one"),
        (
            "FD_DSA_SERVED_MODEL_NAME",
            "a, ,b",
            "FD_DSA_SERVED_MODEL_NAME: --served-model-name: value 2 of 3 is empty, allowed: val",
        ),
        ("FD_DSA_SERVED_MODEL_NAME", ",", "--served-model-name: value 1 of 1 is empty"),
        (
            "FD_DSA_ALLOWED_HOST",
            "a,,",
            "FD_DSA_ALLOWED_HOST: --allowed-host: value 2 of 2 is empty",
        ),
        (
            "FD_DSA_CUDAGRAPH_CAPTURE_SIZES",
            "1,,2",
            "FD_DSA_CUDAGRAPH_CAPTURE_SIZES: --cudagraph-capture-sizes: value 2 of 3 is empty",
        ),
        ("FD_DSA_CUDAGRAPH_PROMPT_SIZES", ",1", "--cudagraph-prompt-sizes: value 1 of 2 is empty"),
        ("FD_DSA_API_KEY", " ,", "FD_DSA_API_KEY: --api-key: allowed is a text of one"),
    ],
)
def test_variables_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        parse_args([])
    assert text in str(caught.value)


def test_a_variable_that_is_nearly_a_flag_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_MAX_MODEL_LENGTH", "5")
    monkeypatch.setenv("FD_DSA_CHECK", "1")
    # the plug-in's own
    monkeypatch.setenv("FD_DSA_DISABLE", "1")
    assert unused_variables() == [
        "the variable FD_DSA_MAX_MODEL_LENGTH is unknown; did you mean FD_DSA_MAX_MODEL_LEN?"
    ]
