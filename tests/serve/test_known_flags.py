"""Command lines of other servers: flags that change nothing are taken, the others name ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.serve.flag_sources import parse_args
from fd_dsa.serve.flags import build_parser
from fd_dsa.serve.known_flags import KNOWN, NOT_NEEDED, OTHER_NAMES, REFUSED, remove_known_flags

OWN = {option for action in build_parser()._actions for option in action.option_strings}
FORMS = [form for forms in NOT_NEEDED.values() for form in forms]


def _flag(name: str) -> str:
    return name if name.startswith("-") else f"--{name}"


def _words(form: str) -> list[list[str]]:
    """Ways to write a flag of NOT_NEEDED on a command line."""
    name, equals, values = form.partition("=")
    if not equals:
        # vLLM takes names with underscores, too
        return [[_flag(name)], ["--" + _flag(name)[2:].replace("-", "_")]][: 1 + ("-" in name[1:])]
    allowed = values.split("|") if values else ["4", "a/b", '{"a": 1}', "-1"]
    return [words for v in allowed for words in ([_flag(name), v], [f"{_flag(name)}={v}"])]


def test_pasted_command_lines_serve() -> None:
    """Recipes of the models of this server, as their makers print them for vLLM."""
    pasted = (
        "/models/DeepSeek-V3.2 --tensor-parallel-size 8 --tokenizer-mode deepseek_v32 "
        "--tool-call-parser deepseek_v32 --enable-auto-tool-choice --reasoning-parser deepseek_v3 "
        "--trust-remote-code --swap-space 16 --disable-log-requests --max-model-len 32k "
        "--kv-cache-dtype fp8_e4m3 --generation-config vllm --no-enable-lora -pp 1"
    )
    args = parse_args(pasted.split())
    assert args.model == "/models/DeepSeek-V3.2" and args.tensor_parallel_size == 8
    assert (args.tool_call_parser, args.reasoning_parser) == ("deepseek_v32", "deepseek_v3")
    assert (args.max_model_len, args.generation_config) == (32_000, "vllm")
    assert list(args.not_needed) == [
        *("--tokenizer-mode", "--enable-auto-tool-choice", "--trust-remote-code", "--swap-space"),
        *("--disable-log-requests", "--no-enable-lora", "-pp"),
    ]
    assert parse_args(["--device", "cuda"]).device == "gpu"
    sglang = "/m --reasoning-parser deepseek-v3 --tool-call-parser deepseekv32"
    args = parse_args(sglang.split())
    assert (args.tool_call_parser, args.reasoning_parser) == ("deepseek_v32", "deepseek_v3")


def test_flags_that_change_nothing_are_taken_out() -> None:
    for words in (words for form in FORMS for words in _words(form)):
        left, reasons = remove_known_flags(["/models/x", *words, "--port", "1"])
        assert left == ["/models/x", "--port", "1"]
        assert list(reasons) == [words[0].partition("=")[0]]


def test_other_values_are_refused() -> None:
    for form in FORMS:
        name, _, values = form.partition("=")
        if values:
            for words in ([_flag(name), "another"], [f"{_flag(name)}=another"], [_flag(name)]):
                with pytest.raises(ConfigError, match=rf"^{_flag(name)}: got '.*', allowed: "):
                    remove_known_flags(words)


def test_flags_that_would_change_answers_name_ours() -> None:
    for ours, names in OTHER_NAMES.items():
        assert set(re.findall(r"--[a-z-]+", ours)) <= OWN
        for name in names:
            with pytest.raises(ConfigError, match=rf"^{_flag(name)}: .*{re.escape(ours)}"):
                remove_known_flags([_flag(name), "2"])
    for reason, names in REFUSED.items():
        for name in names:
            with pytest.raises(ConfigError, match=rf"^{_flag(name)}: ") as error:
                remove_known_flags([_flag(name), "a-secret"])
            assert reason in str(error.value)
            assert "a-secret" not in str(error.value) or "got" in str(error.value)
    with pytest.raises(ConfigError) as error:
        remove_known_flags(["--hf-token=a-secret"])
    assert "a-secret" not in str(error.value) and "HF_TOKEN" in str(error.value)


def test_no_flag_of_ours_is_taken_for_another() -> None:
    assert OWN & KNOWN.keys() == set()
    words = ["--no-enable-prefix-caching", "--api-key", "--port=1", "--served-model-name", "--x"]
    assert remove_known_flags(words) == (words, {})
    # a flag without its value does not swallow the next one
    assert remove_known_flags(["--swap-space", "--port", "1"])[0] == ["--port", "1"]


def test_what_follows_two_dashes_is_left_to_fastdeploy() -> None:
    args = parse_args(["--engine", "fastdeploy", "--", "--quantization", "block_wise_fp8"])
    assert args.passed == ("--quantization", "block_wise_fp8") and args.not_needed == {}


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "trust-remote-code: true\nswap_space: 4\npipeline-parallel-size: 1\n"
        "enable-lora: false\nport: 9\n"
    )
    args = parse_args(["--config", str(path)])
    assert args.port == 9
    names = ["trust-remote-code", "swap_space", "pipeline-parallel-size", "enable-lora"]
    assert list(args.not_needed) == names
    for line, text in (
        ("enable-lora: true", "enable-lora: not supported: adapters are not supported"),
        ("context-length: 5", "context-length: the flag for this is --max-model-len"),
        ("nnodes: 2", "nnodes: got '2', allowed: 1; not supported: the embedded engine"),
    ):
        path.write_text(line)
        with pytest.raises(ConfigError, match=rf"--config: .*: {text}"):
            parse_args(["--config", str(path)])
