"""The launcher: engine, command, environment and what a flag cannot do there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch import choice, environment, start
from fd_dsa.fastdeploy_plugin.launch.choice import choose_engine, refuse_for_embedded
from fd_dsa.fastdeploy_plugin.launch.environment import ENTRY_POINT_GROUPS, server_environment
from fd_dsa.fastdeploy_plugin.launch.start import Launch, prepare, without_secrets
from fd_dsa.serve.flag_sources import parse_args

FASTDEPLOY_ONLY = [
    (["--data-parallel-size", "2"], "--data-parallel-size is 2"),
    (["--enable-expert-parallel"], "--enable-expert-parallel is set"),
    (["--", "--ips", "a,b"], "--ips is given after --"),
]
PLACE = ["--model", "{}", "--served-model-name", "m", "--host", "127.0.0.1", "--port", "8000"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """FastDeploy is there, and fd_dsa is an installed package."""
    monkeypatch.setattr(choice, "find_spec", lambda name: name == "fastdeploy" or None)
    monkeypatch.setattr(start, "missing_entry_points", list)
    return monkeypatch


@pytest.mark.parametrize(("argv", "why"), FASTDEPLOY_ONLY)
def test_auto_takes_fastdeploy_only_for_flags_of_its_own(
    argv: list[str], why: str, installed: pytest.MonkeyPatch
) -> None:
    assert choose_engine(parse_args(argv)) == ("fastdeploy", why)
    with pytest.raises(ConfigError, match=f"{why}, which --engine embedded does not have"):
        refuse_for_embedded(parse_args(argv))
    for several in ([], ["-tp", "8"], ["--data-parallel-size", "1"]):
        assert choose_engine(parse_args(several))[0] == "embedded"
        refuse_for_embedded(parse_args(several))
    installed.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(
        BackendUnavailable, match=f"^{why}, which needs FastDeploy.*index"
    ) as caught:
        choose_engine(parse_args(argv))
    assert "--engine embedded serves" in str(caught.value)


def prepared(tmp_path: Path, words: str) -> Launch:
    """The command for a model folder `m` and some flags."""
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    return prepare(parse_args([str(folder), *words.split()]))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--tensor-parallel-size 8 --data-parallel-size 2 --enable-expert-parallel",
        "--max-model-len 8192 --max-num-seqs 20 --max-num-batched-tokens 4096",
        "--gpu-memory-utilization 0.8 --num-gpu-blocks-override 2048 --no-enable-prefix-caching",
        "--enable-prefix-caching --api-key one --api-key two",
    ],
)
@pytest.mark.usefixtures("installed")
def test_flags_of_both_are_passed_as_they_are(words: str, tmp_path: Path) -> None:
    found = prepared(tmp_path, f"{words} -- --quantization block_wise_fp8 --x=y")
    place = [word.format(tmp_path / "m") for word in PLACE]
    assert list(found.command[1:3]) == ["-m", "fastdeploy.entrypoints.openai.api_server"]
    assert list(found.command[3:]) == [*place, *words.split(), *found.command[-3:]]
    assert found.command[-3:] == ("--quantization", "block_wise_fp8", "--x=y")
    assert found.url == "http://127.0.0.1:8000" and found.model_name == "m"
    assert found.max_model_len == (8192 if "8192" in words else 2048)


@pytest.mark.usefixtures("installed")
def test_fastdeploys_last_value_wins(tmp_path: Path) -> None:
    passed = "--model org/name --host 0.0.0.0 --port 9001 --max-model-len=640"
    found = prepared(tmp_path, f"--port 9000 --served-model-name n -- {passed}")
    assert found.command[-7:] == tuple(passed.split())
    assert found.url == "http://127.0.0.1:9001"
    assert (found.model_name, found.max_model_len) == ("n", 640)
    # only after the dashes
    other = prepare(parse_args(["--", "--model", "org/name"]))
    assert other.model_name == "name" and other.command.count("org/name") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seed 0", "--seed: got 0, but it is a flag of --engine embedded; leave it out, and"),
        ("--dtype bfloat16", "--dtype: got 'bfloat16', but it is a flag of --engine embedded"),
        ("--block-size 32", "--block-size: got 32, but it is a flag of --engine embedded"),
        ("--served-model-name a --served-model-name b", "got 2 names, FastDeploy takes one"),
        ("-- --port http", "after --: argument --port: invalid int value: 'http'"),
        ("-- --port", "after --: argument --port: expected one argument"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_a_flag_that_cannot_be_honoured_is_one_line(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, words)
    assert said in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_model_is_needed() -> None:
    with pytest.raises(ConfigError, match="--model: got none, --engine fastdeploy needs the fold"):
        prepare(parse_args([]))


def test_a_package_without_entry_points_is_refused(installed: pytest.MonkeyPatch) -> None:
    group = ENTRY_POINT_GROUPS[1]
    installed.setattr(start, "missing_entry_points", lambda: [group])
    with pytest.raises(BackendUnavailable, match=f"no entry point in {group}, .*pip install ."):
        prepare(parse_args([]))


@pytest.mark.parametrize(
    ("before", "plugins"),
    [
        ({}, "fd_dsa"),
        ({"PATH": "/bin", "FD_LOG_DIR": "there", "FD_DISABLE_CHUNKED_PREFILL": "1"}, "fd_dsa"),
        ({"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": ""}, "fd_dsa"),
        ({"FD_PLUGINS": "other"}, "other,fd_dsa"),
        ({"FD_PLUGINS": " other , fd_dsa ,"}, "other,fd_dsa"),
        ({"FD_PLUGINS": "a,b,a"}, "a,b,fd_dsa"),
    ],
)
def test_two_variables_are_set_and_the_rest_passes_through(
    before: dict[str, str], plugins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "plugin_names", lambda: {"fd_dsa", "other"})
    given = dict(before)
    found, warnings = server_environment(before)
    assert found == given | {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": plugins}
    assert before == given
    # a user who names some has chosen
    assert ["(other) stay out" in line for line in warnings] == [True] * ("FD_PLUGINS" not in given)


def test_another_backend_is_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match="got 'MLA_ATTN', --engine fastdeploy needs DSA_ATTN"):
        server_environment({"FD_ATTENTION_BACKEND": "MLA_ATTN"})


def test_secrets_are_kept_out_of_the_log() -> None:
    given = ["--api-key", "a", "--api-key=b", "--scheduler-password", "c", "--port", "1", "x-key"]
    shown = ["--api-key", "***", "--api-key=***", "--scheduler-password", "***", "--port", "1"]
    assert without_secrets(given) == [*shown, "x-key"]
