"""Flags of other benchmarks, and the effect of each on a command line of `fd-dsa bench`.

Sources: `vllm bench serve --help`, and the guide of `python -m sglang.bench_serving`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fd_dsa.command_line.values import digits, reader
from fd_dsa.environment import local_url
from fd_dsa.serve.known_flags import collect, remove_known_flags

_COMPLETIONS = "requests go to /v1/completions"
_PROMPTS = "prompts are random tokens, all of the same length"
_GREEDY = "answers are greedy, with the same fields in every request"
_LENGTH = "every answer has --random-output-len tokens"
_INTERVALS = "requests start at the intervals of a Poisson process, or all at once"
_FIGURES = "the tables have mean, p50, p90, p95 and p99 of every latency"
_FILE = "--output is one JSON file with all figures and every request"
BACKENDS = ("vllm", "openai", "openai-completions", "sglang", "sglang-oai")
"""Values of --backend: servers of any of these kinds get the same requests."""
NOT_NEEDED: Mapping[str, tuple[str, ...]] = {
    _PROMPTS: (
        *("dataset-name=random|random-ids", "random-range-ratio=0|0.0|1|1.0"),
        *("random-prefix-len=0", "disable-shuffle", "no-oversample", "no-stream"),
    ),
    "prompts are token ids, which need no tokenizer": (
        *("tokenizer=", "tokenizer-mode=", "trust-remote-code", "skip-tokenizer-init"),
        *("skip-chat-template", "tokenize-prompt"),
    ),
    _COMPLETIONS: ("endpoint=/v1/completions|v1/completions", "endpoint-type=vllm|openai"),
    _LENGTH: ("ignore-eos",),
    _GREEDY: (
        *("temperature=0|0.0", "top-p=1|1.0", "top-k=-1|0", "min-p=0|0.0", "n=1"),
        *("frequency-penalty=0|0.0", "presence-penalty=0|0.0", "repetition-penalty=1|1.0"),
    ),
    _INTERVALS: ("burstiness=1|1.0",),
    _FIGURES: ("percentile-metrics=", "metric-percentiles="),
    "two requests warm the server up": (
        *("num-warmups=", "warmup-requests=", "ready-check-timeout-sec="),
    ),
    "the output has no progress bar": ("disable-tqdm",),
    _FILE: ("save-detailed", "output-details"),
    "it changes only names": ("label=", "tag=", "request-id-prefix="),
}
"""Flags that change no figure, by reason, in the forms of `known_flags.NOT_NEEDED`."""
REFUSED: Mapping[str, tuple[str, ...]] = {
    _PROMPTS: (
        *("dataset-name", "dataset-path", "random-range-ratio", "random-prefix-len"),
        *("sharegpt-output-len", "sharegpt-context-len", "sonnet-input-len", "sonnet-output-len"),
        *("sonnet-prefix-len", "custom-output-len", "hf-subset", "hf-split", "hf-output-len"),
        *("hf-name", "prefix-repetition-prefix-len", "prefix-repetition-suffix-len"),
        *("prefix-repetition-num-prefixes", "prefix-repetition-output-len", "gsp-num-groups"),
        *("gsp-prompts-per-group", "gsp-system-prompt-len", "gsp-question-len", "gsp-output-len"),
        *("random-image-count", "image-count", "image-resolution", "apply-chat-template"),
        *("prompt-suffix", "enable-multimodal-chat"),
    ),
    _COMPLETIONS: ("endpoint", "endpoint-type"),
    _LENGTH: ("disable-ignore-eos",),
    _GREEDY: (
        *("temperature", "top-p", "top-k", "min-p", "n", "frequency-penalty"),
        *("presence-penalty", "repetition-penalty", "logprobs", "return-logprob"),
        *("use-beam-search", "extra-body", "extra-request-body", "lora-modules", "lora-name"),
        *("header", "return-routed-experts"),
    ),
    "latencies come from streams": ("disable-stream",),
    _INTERVALS: (
        *("burstiness", "ramp-up-strategy", "ramp-up-start-rps", "ramp-up-end-rps"),
        *("use-trace-timestamps", "mooncake-slowdown-factor"),
    ),
    "no figure is a goodput; compute it from the requests in the file of --output": ("goodput",),
    _FILE: ("append-result", "metadata", "plot-timeline", "plot-dataset-stats"),
    "the client only sends requests": (
        *("profile", "profile-by-stage", "flush-cache", "pd-separated", "profile-num-steps"),
    ),
    "certificates are always checked": ("insecure",),
}
"""Refused flags, by the reason. Some have accepted values in `NOT_NEEDED`."""
_SAME = {
    "--input-len": "--random-input-len",
    "--random-input": "--random-input-len",
    "--output-len": "--random-output-len",
    "--random-output": "--random-output-len",
    "--num-prompt": "--num-prompts",
    "--output-file": "--output",
}
_KNOWN = collect(NOT_NEEDED, REFUSED, {})


def translate(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Translate a command line of `vllm bench serve` or `sglang.bench_serving`.

    Returns:
        The command line of `fd-dsa bench`, and the reason for each flag that was removed.

    Raises:
        ConfigError: a flag would change the figures. The message has the reason.
    """
    left, reasons = remove_known_flags(words, _KNOWN)
    split = [word.partition("=") for word in left]
    return ["".join((_SAME.get(flag, flag), *value)) for flag, *value in split], reasons


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that have a meaning here, by their names in `vllm bench serve`."""
    address = reader(str, "a name or an address; --base-url takes a URL", _is_host)
    port = reader(digits, "1 to 65535", lambda number: 1 <= number <= 65535)
    kinds = f"one of {', '.join(BACKENDS)}: {_COMPLETIONS}, with token ids"
    group = parser.add_argument_group("as in vllm bench serve")
    group.add_argument("--host", type=address, help="of a running server (127.0.0.1)")
    group.add_argument("--port", metavar="N", type=port, help="of a running server (8000)")
    group.add_argument(
        "--backend",
        metavar="KIND",
        type=reader(str, kinds, BACKENDS.__contains__),
        help=f"kind of a running server: {', '.join(BACKENDS)}; the requests are the same",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="name to send, if --model is a folder"
    )
    group.add_argument("--save-result", action="store_true", help="write all figures as JSON")
    group.add_argument("--result-dir", metavar="DIR", help="folder of that file")
    group.add_argument("--result-filename", metavar="FILE", help="name of that file")


def _is_host(text: str) -> bool:
    return bool(text) and not set(text) & set("/ ")


def running_server(args: argparse.Namespace) -> str | None:
    """Return the URL of a running server that flags of another benchmark name, or None."""
    if args.base_url is not None or (args.host or args.port or args.backend) is None:
        return None
    return f"{local_url(args.host or '127.0.0.1', args.port or 8000)}/v1"


def address_flags(args: argparse.Namespace) -> str:
    """Return the flags that chose the server, for errors about it."""
    if args.base_url is not None:
        return "--base-url"
    given = {"--host": args.host, "--port": args.port, "--backend": args.backend}
    return " and ".join(flag for flag, value in given.items() if value is not None) or "--serve"


def result_file(args: argparse.Namespace) -> str | None:
    """Return the path of the file with all figures, or None."""
    if not (args.save_result or args.result_dir or args.result_filename):
        return None
    name = args.result_filename or time.strftime("fd_dsa-%Y%m%d-%H%M%S.json")
    return str(Path(args.result_dir or "") / name)
