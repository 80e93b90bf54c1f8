"""Command lines of other benchmarks: `fd-dsa bench` takes them, or says in a line why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_dsa.client.bench import build_parser, main, parse_args
from fd_dsa.client.bench_flags import BACKENDS, NOT_NEEDED, REFUSED
from fd_dsa.errors import ConfigError
from fd_dsa.serve.known_flags import collect
from tests.client.test_bench import AnyTokens
from tests.serve.conftest import running
from tests.serve.fake_engine import FakeEngine
from tests.serve.processes import run_console

OWN = {option for action in build_parser()._actions for option in action.option_strings}
VLLM = (
    "--backend vllm --model deepseek-ai/DeepSeek-V3.2 --endpoint /v1/completions --port 8001 "
    "--dataset-name random --random-input-len 1024 --random-output-len 128 --num-prompts 100 "
    "--request-rate inf --max-concurrency 8 --ignore-eos --trust-remote-code --seed 3 "
    "--percentile-metrics ttft,tpot,itl,e2el --metric-percentiles 50,99 --disable-tqdm "
    "--temperature 0 --top-k -1 --burstiness 1.0 --random_range_ratio 0.0 --num-warmups 3"
)
SGLANG = (
    "--backend sglang-oai --host 0.0.0.0 --port 30000 --dataset-name random --num-prompt 9 "
    "--random-input 64 --random-output=32 --random-range-ratio 1.0 --output-file out.json "
    "--warmup-requests 2 --tokenizer /models/x"
)


def test_pasted_command_lines_are_taken() -> None:
    args, passed = parse_args(VLLM.split())
    assert passed == [] and args.base_url == "http://127.0.0.1:8001/v1"
    assert args.model == "deepseek-ai/DeepSeek-V3.2"
    assert (args.random_input_len, args.random_output_len, args.num_prompts) == (1024, 128, 100)
    assert (args.request_rate, args.max_concurrency, args.seed) == (float("inf"), 8, 3)
    assert args.not_needed["--ignore-eos"] == "every answer has --random-output-len tokens"
    args, _ = parse_args(SGLANG.split())
    assert args.base_url == "http://127.0.0.1:30000/v1"
    assert (args.random_input_len, args.random_output_len, args.num_prompts) == (64, 32, 9)
    assert args.output == "out.json"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--port {}", "--port"),
        ("--host 127.0.0.1 --port {} --backend vllm", "--host and --port and --backend"),
        ("--base-url http://127.0.0.1:{} --port 9", "--base-url"),
    ],
)
def test_an_error_names_the_flags_that_were_given(
    capsys: pytest.CaptureFixture[str], line: str, names: str
) -> None:
    with running(FakeEngine()) as live:
        port = live.url.rpartition(":")[2]
    # it is gone
    assert main(line.format(port).split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fd_dsa: error: {names}: http://127.0.0.1:{port}/v1 cannot be reached")


@pytest.mark.parametrize(
    ("line", "url"),
    [
        ("", None),
        ("--port 9", "http://127.0.0.1:9/v1"),
        ("--host ::1", "http://[::1]:8000/v1"),
        # as there, a benchmark of a kind of server starts none
        *((f"--backend {kind}", "http://127.0.0.1:8000/v1") for kind in BACKENDS),
        ("--base-url http://a:1 --port 2", "http://a:1"),
    ],
)
def test_the_address_of_a_running_server(line: str, url: str | None) -> None:
    args, _ = parse_args(line.split())
    assert args.base_url == url
    assert ("--port" in args.not_needed) == ("a:1" in line)


def test_the_file_of_figures_has_the_name_of_either_command() -> None:
    line = "--save-result --result-dir a --result-filename b.json"
    assert parse_args(line.split())[0].output == str(Path("a/b.json"))
    assert parse_args(["--output", "c"])[0].output == "c"
    output = parse_args(["--save-result"])[0].output
    assert output.startswith("fd_dsa-") and output.endswith(".json")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *(
            (
                f"--backend {kind}",
                f"--backend: got '{kind}'; must be one of vllm, openai, openai-completions, "
                "sglang, sglang-oai: requests go to /v1/completions, with token ids",
            )
            for kind in ("openai-chat", "tgi", "vlm")
        ),
        ("--port 0", "--port: got '0'; must be 1 to 65535"),
        ("--host http://a:1", "--host: got 'http://a:1'; must be a name or an address; --base-url"),
        ("--dataset-name sharegpt", "got 'sharegpt', allowed: random, random-ids; not supported: "),
        ("--endpoint /v1/chat/completions", "got '/v1/chat/completions', allowed: /v1/completions"),
        ("--goodput ttft:9", "--goodput: not supported: no figure is a goodput"),
        ("--temperature 0.7", "--temperature: got '0.7', allowed: 0, 0.0; not supported: answers"),
        ("--serve --port 8", "--serve: got it with --host, --port or --backend"),
        ("--port 8 -- --seed 1", "flags after --: they are for a server of our own"),
        ("--bakend vllm", "unknown flag --bakend; did you mean --backend?"),
    ],
)
def test_what_is_refused_is_one_line(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_args(line.split())
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_flag_of_ours_is_taken_for_another() -> None:
    known = collect(NOT_NEEDED, REFUSED, {})
    assert OWN & known.keys() == set()
    for flag, entry in known.items():
        assert entry.reason or entry.refusal, flag


def test_a_pasted_line_measures(tmp_path: Path) -> None:
    with running(AnyTokens()) as live:
        line = SGLANG.replace("30000", live.url.rpartition(":")[2])
        done = run_console(tmp_path, "bench", *line.split())
    assert done.returncode == 0, done.stderr
    assert "--tokenizer is not needed here: prompts are token ids" in done.stderr
    assert (tmp_path / "out.json").exists()
