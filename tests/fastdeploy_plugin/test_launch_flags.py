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


# what FastDeploy gets before `--block-size 64`; the same words where it is ""
TRANSLATED = {
    "--max-model-len 8192": "",
    "--max-num-seqs 20": "",
    "--max-num-batched-tokens 4096": "",
    "--num-gpu-blocks-override 2048": "",
    "--tensor-parallel-size 8": "",
    "--data-parallel-size 16": "",
    "--enable-expert-parallel": "",
    "--enable-prefix-caching": "",
    "--no-enable-prefix-caching": "",
    "--shutdown-timeout 12": "--timeout-graceful-shutdown 12",
    "--chat-template t.jinja": "",
    "--tokenizer /t": "",
    "--gpu-memory-utilization 0.8": "",
    "--api-key one --api-key two": "",
    "--max-concurrency 9": "",
    # in the order of the table
    "--max-num-seqs 8 --enable-expert-parallel -tp 2": (
        "--tensor-parallel-size 2 --enable-expert-parallel --max-num-seqs 8"
    ),
    # what FastDeploy does anyway; the next four are in front, see test_launch_process
    **dict.fromkeys(
        (
            *("--block-size 64", "--tool-call-parser auto", "--reasoning-parser auto"),
            *("--device gpu", "--dtype auto", "--kv-cache-dtype fp8_ds_mla", "--log-level debug"),
            *("--engine fastdeploy", "--download", "--dry-run", "--load-format safetensors"),
            *("--enable-chunked-prefill", "-- --no-enable-prefix-caching"),
            *("/m", "--model /m", "--served-model-name name", "--host 0.0.0.0", "--port 9000"),
        ),
        " ",
    ),
}


@pytest.mark.parametrize("words", TRANSLATED)
def test_flags_with_a_counterpart(words: str) -> None:
    expected = (TRANSLATED[words] or words).split()
    assert translated(*words.split()) == [*expected, "--block-size", "64"]


@pytest.mark.parametrize("action", build_parser()._actions, ids=lambda action: action.dest)
def test_each_flag_is_mapped_or_refused(action: object) -> None:
    name, nargs = action.dest, action.nargs  # type: ignore[attr-defined]
    flag = f"--{name.replace('_', '-')}"
    if name in NO_COUNTERPART and not any(one.startswith(flag) for one in TRANSLATED):
        said = refusal(flag) if nargs == 0 else refusal(flag, "1")
        assert flag in said and "FastDeploy" in said
    elif name not in ("help", "version", "positional_model", "config"):
        assert any(one.startswith(flag) for one in TRANSLATED)


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ("--device cpu", ["--device: got 'cpu'", "CUDA_VISIBLE_DEVICES", "allowed: auto, gpu"]),
        ("--dtype bfloat16", ["--dtype: got 'bfloat16'", "config.json", "allowed: auto"]),
        ("--kv-cache-dtype bfloat16", ["got 'bfloat16'", "allowed: auto, fp8_ds_mla"]),
        ("--kv-cache-memory-bytes 8G", ["--kv-cache-memory-bytes", "--gpu-memory-utilization"]),
        ("--seed 0", ["--seed: got 0", "FastDeploy's --seed"]),
        ("--block-size 32", ["--block-size: got 32", "allowed with --engine fastdeploy: 64"]),
        ("--max-model-len 100", ["--max-model-len: got 100", "multiple of 64", "take 128"]),
        ("--shutdown-timeout 0", ["got 0", "--timeout-graceful-shutdown", "0 as no limit"]),
        ("--shutdown-timeout 1.5", ["got 1.5", "--timeout-graceful-shutdown"]),
        ("--config no/such/file", ["no/such/file"]),
        # on both sides
        ("--max-num-seqs 128 -- --max-num-seqs 64", ["got 128, and --max-num-seqs '64' after --"]),
        ("-tp 128 -- --tensor-parallel-size=64", ["got 128, and --tensor-parallel-size '64' aft"]),
        (
            "--no-enable-prefix-caching -- --no-enable-prefix-caching",
            ["--enable-prefix-caching: got False, and --enable-prefix-caching False after --"],
        ),
        ("--api-key secret-a -- --api-key secret-b", ["--api-key: got ***, and --api-key *** aft"]),
        # after the dashes alone
        ("-- --block-size 32", ["--block-size: got 32"]),
        ("-- --max-model-len 100", ["--max-model-len: got 100"]),
        ("-- --max-model-len x", ["--max-model-len (after --): got 'x'"]),
        ("-- --port", ["after --: argument --port: expected one argument"]),
    ],
)
def test_refusals_name_both_sides(words: str, texts: list[str]) -> None:
    said = refusal(*words.split())
    assert all(text in said for text in texts), said
    assert "secret" not in said


@pytest.mark.parametrize("flag", ["--num-servers", "--ports", "--ports=1,2", "--args"])
def test_the_launcher_of_several_servers_is_pointed_to(flag: str) -> None:
    said = refusal("--", flag, "8")
    assert said.startswith(flag)
    assert "FD_ATTENTION_BACKEND=DSA_ATTN FD_PLUGINS=fd_dsa python -m fastdeploy" in said
    assert "multi_api_server" in said


def test_what_stands_after_the_dashes_is_not_ours() -> None:
    argv = ["--max-num-seqs", "8", "--", "--ips", "a,b", "--engine", "x", "--", "--port", "1"]
    passed = PassedFlags.read(parse_args(argv).passed)
    assert passed.arguments == ("--ips", "a,b", "--engine", "x", "--", "--port", "1")
    assert passed.num_nodes == 2
    assert translated("--", "--block-size", "64", "--max-model-len", "128") == []


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--port 8180", {"--port": "8180"}),
        ("--port=8180", {"--port": "8180"}),
        ("--port 1 --port 2", {"--port": "2"}),
        # as in FastDeploy's own recipes
        ("--max-num-seq 20", {"--max-num-seqs": "20"}),
        ("-tp 8", {"--tensor-parallel-size": "8"}),
        ("--enable-expert-parallel", {"--enable-expert-parallel": True}),
        # only look like known ones
        ("--timeout 5 --scheduler-host h --max-waiting-time -1 --model-impl a", {"--timeout": "5"}),
    ],
)
def test_flags_after_the_dashes_are_understood(words: str, values: dict[str, object]) -> None:
    passed = PassedFlags.read(words.split())
    assert passed.values == values
    assert passed.arguments == tuple(words.split())


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
