"""Flags of ours become FastDeploy's, or an error that names both; none is forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.launch.flags import (
    LAUNCHER,
    MAPPED,
    NO_COUNTERPART,
    PassedFlags,
    translate,
    without_secrets,
)
from fd_dsa.serve.flag_sources import parse_args
from fd_dsa.serve.flags import build_parser


def translated(*argv: str) -> list[str]:
    """What FastDeploy gets for a command line of ours."""
    args = parse_args(argv)
    return translate(args, PassedFlags.read(args.passed))


def refusal(*argv: str) -> str:
    """The error of a command line."""
    with pytest.raises(ConfigError) as caught:
        translated(*argv)
    return str(caught.value)


def test_every_flag_has_a_place() -> None:
    names = {action.dest for action in build_parser()._actions}
    names -= {"help", "version", "positional_model"}
    places = [set(MAPPED), set(NO_COUNTERPART), set(LAUNCHER)]
    assert set.union(*places) == names
    assert sum(map(len, places)) == len(names), "a flag has two places"


# one value for each flag, other than its default
VALUES: dict[str, tuple[list[str], list[str]]] = {
    "max_model_len": (["8192"], ["--max-model-len", "8192"]),
    "max_num_seqs": (["20"], ["--max-num-seqs", "20"]),
    "max_num_batched_tokens": (["4096"], ["--max-num-batched-tokens", "4096"]),
    "block_size": (["64"], []),
    "num_gpu_blocks_override": (["2048"], ["--num-gpu-blocks-override", "2048"]),
    "tensor_parallel_size": (["8"], ["--tensor-parallel-size", "8"]),
    "data_parallel_size": (["16"], ["--data-parallel-size", "16"]),
    "enable_expert_parallel": ([], ["--enable-expert-parallel"]),
    "enable_prefix_caching": ([], ["--enable-prefix-caching"]),
    "shutdown_timeout": (["12"], ["--timeout-graceful-shutdown", "12"]),
    "chat_template": (["t.jinja"], ["--chat-template", "t.jinja"]),
    "tool_call_parser": (["auto"], []),
    "reasoning_parser": (["auto"], []),
    "device": (["gpu"], []),
    "dtype": (["auto"], []),
    "kv_cache_dtype": (["fp8_ds_mla"], []),
    "log_level": (["debug"], []),
    "engine": (["fastdeploy"], []),
    "dry_run": ([], []),
    "tokenizer": (["/t"], ["--tokenizer", "/t"]),
    "gpu_memory_utilization": (["0.8"], ["--gpu-memory-utilization", "0.8"]),
    "load_format": (["safetensors"], []),
    "enable_chunked_prefill": ([], []),
    "api_key": (["one", "--api-key", "two"], ["--api-key", "one", "--api-key", "two"]),
    "max_concurrency": (["9"], ["--max-concurrency", "9"]),
    # these four are in front, see test_launch_process
    "model": (["/m"], []),
    "served_model_name": (["name"], []),
    "host": (["0.0.0.0"], []),
    "port": (["9000"], []),
}


@pytest.mark.parametrize(
    "name", sorted({a.dest for a in build_parser()._actions} - {"help", "version"})
)
def test_each_flag_is_mapped_or_refused(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    if name == "positional_model":
        assert translated("/m") == ["--block-size", "64"]
    elif name == "config":
        # its keys are flags, each of which has a place
        assert "no such file" in refusal(flag, "no/such/file").lower()
    elif name in VALUES:
        values, expected = VALUES[name]
        assert translated(flag, *values) == [*expected, "--block-size", "64"]
    else:
        is_switch = next(a.nargs == 0 for a in build_parser()._actions if a.dest == name)
        said = refusal(flag) if is_switch else refusal(flag, "1")
        assert flag in said and "FastDeploy" in said


def test_prefix_caching_can_be_switched_off_on_either_side() -> None:
    off = "--no-enable-prefix-caching"
    assert translated(off) == [off, "--block-size", "64"]
    assert translated("--", off) == ["--block-size", "64"]
    said = refusal(off, "--", off)
    assert "--enable-prefix-caching: got False, and --enable-prefix-caching False after --" in said


def test_the_order_is_that_of_the_table() -> None:
    argv = ["--max-num-seqs", "8", "--enable-expert-parallel", "-tp", "2"]
    assert translated(*argv)[:5] == [
        *("--tensor-parallel-size", "2"),
        "--enable-expert-parallel",
        *("--max-num-seqs", "8"),
    ]


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (
            ["--device", "cpu"],
            ["--device: got 'cpu'", "CUDA_VISIBLE_DEVICES", "allowed: auto, gpu"],
        ),
        (["--dtype", "bfloat16"], ["--dtype: got 'bfloat16'", "config.json", "allowed: auto"]),
        (["--kv-cache-dtype", "bfloat16"], ["got 'bfloat16'", "allowed: auto, fp8_ds_mla"]),
        (
            ["--kv-cache-memory-bytes", "8G"],
            ["--kv-cache-memory-bytes", "--gpu-memory-utilization"],
        ),
        (["--seed", "0"], ["--seed: got 0", "FastDeploy's --seed"]),
        (["--block-size", "32"], ["--block-size: got 32", "allowed with --engine fastdeploy: 64"]),
        (["--max-model-len", "100"], ["--max-model-len: got 100", "multiple of 64", "take 128"]),
        (["--shutdown-timeout", "0"], ["got 0", "--timeout-graceful-shutdown", "0 as no limit"]),
        (["--shutdown-timeout", "1.5"], ["got 1.5", "--timeout-graceful-shutdown"]),
    ],
)
def test_refusals_name_both_sides(argv: list[str], texts: list[str]) -> None:
    said = refusal(*argv)
    assert all(text in said for text in texts), said


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "tensor_parallel_size"])
@pytest.mark.parametrize("form", ["two", "equals"])
def test_a_flag_on_both_sides_is_refused(name: str, form: str) -> None:
    flag = MAPPED[name]
    after = [flag, "64"] if form == "two" else [f"{flag}=64"]
    said = refusal(flag, "128", "--", *after)
    assert f"{flag}: got 128, and {flag} '64' after --" in said


def test_keys_on_both_sides_are_not_shown() -> None:
    said = refusal("--api-key", "secret-a", "--", "--api-key", "secret-b")
    assert "--api-key: got ***" in said and "secret" not in said


def test_what_stands_after_the_dashes_is_not_ours() -> None:
    argv = ["--max-num-seqs", "8", "--", "--ips", "a,b", "--engine", "x", "--", "--port", "1"]
    passed = PassedFlags.read(parse_args(argv).passed)
    assert passed.arguments == ("--ips", "a,b", "--engine", "x", "--", "--port", "1")
    assert passed.num_nodes == 2


@pytest.mark.parametrize(
    ("arguments", "flag", "value"),
    [
        (["--port", "8180"], "--port", "8180"),
        (["--port=8180"], "--port", "8180"),
        (["--port", "1", "--port", "2"], "--port", "2"),
        # as in FastDeploy's own recipes
        (["--max-num-seq", "20"], "--max-num-seqs", "20"),
        (["-tp", "8"], "--tensor-parallel-size", "8"),
        (["--enable-expert-parallel"], "--enable-expert-parallel", True),
    ],
)
def test_flags_after_the_dashes_are_understood(
    arguments: list[str], flag: str, value: object
) -> None:
    passed = PassedFlags.read(arguments)
    assert passed.values[flag] == value
    assert passed.arguments == tuple(arguments)


def test_flags_that_only_look_like_ours() -> None:
    words = "--timeout 5 --scheduler-host h --max-waiting-time -1 --model-impl a"
    assert set(PassedFlags.read(words.split()).values) == {"--timeout"}


def test_checks_look_after_the_dashes_too() -> None:
    assert "--block-size: got 32" in refusal("--", "--block-size", "32")
    assert "--max-model-len: got 100" in refusal("--", "--max-model-len", "100")
    assert "--max-model-len (after --): got 'x'" in refusal("--", "--max-model-len", "x")
    assert translated("--", "--block-size", "64", "--max-model-len", "128") == []
    assert "after --: argument --port: expected one argument" in refusal("--", "--port")


@pytest.mark.parametrize("flag", ["--num-servers", "--ports", "--ports=1,2", "--args"])
def test_the_launcher_of_several_servers_is_pointed_to(flag: str) -> None:
    said = refusal("--", flag, "8")
    assert said.startswith(flag)
    assert "FD_ATTENTION_BACKEND=DSA_ATTN FD_PLUGINS=fd_dsa python -m fastdeploy" in said
    assert "multi_api_server" in said


def test_a_file_of_flags_counts(tmp_path: Path) -> None:
    file = tmp_path / "fd.yaml"
    file.write_text("port: 9001\nmax_model_len: 100\nquantization: wint4\nhost:\n")
    passed = PassedFlags.read(["--config", str(file), "--port", "9002"])
    assert passed.values["--port"] == "9002"
    assert passed.values["--max-model-len"] == 100
    assert "--host" not in passed.values and "--quantization" not in passed.values
    assert "--max-model-len: got 100" in refusal("--", "--config", str(file))


@pytest.mark.parametrize("text", [None, "- a\n", "a: [\n"])
def test_a_bad_file_of_flags_is_one_line(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "fd.yaml"
    if text is not None:
        file.write_text(text)
    said = refusal("--", "--config", str(file))
    assert said.startswith("--config (after --): ") and "\n" not in said


def test_secrets_are_kept_out_of_the_log() -> None:
    given = ["--api-key", "a", "--api-key=b", "--scheduler-password", "c", "--port", "1", "x-key"]
    shown = ["--api-key", "***", "--api-key=***", "--scheduler-password", "***", "--port", "1"]
    assert without_secrets(given) == [*shown, "x-key"]
