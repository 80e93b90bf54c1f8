"""Flags of `python -m fd_dsa.serve`; `--help` imports neither Paddle nor the server."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from fd_dsa import __version__
from fd_dsa.chat.parsers import REASONING_FORMATS, TOOL_FORMATS
from fd_dsa.config import DEFAULT_TARGET_MS, DEVICES
from fd_dsa.errors import ConfigError
from fd_dsa.serve import flag_values as values

DEFAULT_MAX_BODY_BYTES = 16 << 20
"""Bytes of a request's body: two million token ids."""
DEFAULT_MAX_BODY_VALUES = 1 << 21
"""What the values of a body may count: two million token ids, or a quarter of a million texts."""
DEFAULT_MAX_ANSWER_SCORES = 1 << 19
"""Log-probabilities of an answer; some 40 MiB of JSON."""
DEFAULT_MAX_CONCURRENCY = 512
PROMPT_BYTES_PER_TOKEN = 16
"""Bytes of a prompt's text for each token of the context, unless --max-prompt-bytes says more."""


def build_parser() -> argparse.ArgumentParser:
    """The parser, flags grouped as in `--help`."""
    parser = _Parser(
        prog="python -m fd_dsa.serve",
        usage="%(prog)s [MODEL] [flags] [-- flags of FastDeploy]",
        description="Serve a DeepSeek-V3.2 or GLM-5 shaped checkpoint over the OpenAI API.",
        epilog="Each flag is also a variable, FD_DSA_PORT for --port, and a key of the file of "
        "--config; the command line goes before variables, and these before the file.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"fd_dsa {__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags as its keys")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="print the resolved configuration and the memory plan, load no weights, and end",
    )
    _add_model_flags(parser.add_argument_group("model"))
    _add_chat_flags(parser.add_argument_group("chat"))
    _add_server_flags(parser.add_argument_group("server"))
    _add_cache_flags(parser.add_argument_group("cache"))
    _add_scheduler_flags(parser.add_argument_group("scheduler"))
    _add_graph_flags(parser.add_argument_group("CUDA graphs (on a GPU)"))
    _add_parallel_flags(parser.add_argument_group("parallel (with FastDeploy)"))
    _add_logging_flags(parser.add_argument_group("logging"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    folder = "folder in Hugging Face format (default: the demo model of the package)"
    group.add_argument("positional_model", metavar="MODEL", nargs="?", help=folder)
    group.add_argument("--model", metavar="DIR", help="the same as MODEL")
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        action="append",
        help="name for the `model` field of requests; may be repeated (default: folder name)",
    )
    group.add_argument(
        "--tokenizer", metavar="DIR", help="folder of the tokenizer (default: the model's)"
    )
    group.add_argument(
        "--load-format",
        metavar="FORMAT",
        help="auto, safetensors, or dummy for random weights (default: auto)",
    )
    group.add_argument(
        "--index-topk",
        metavar="N",
        type=values.integer,
        help="keys that the indexer chooses for a token (default: the model's)",
    )
    group.add_argument(
        "--device",
        choices=DEVICES,
        help="where the model runs; auto is a GPU where Paddle has one (default: auto)",
    )
    group.add_argument("--dtype", help="auto, float32 or bfloat16 (default: auto; CPU: float32)")
    group.add_argument(
        "--engine",
        choices=("auto", "embedded", "fastdeploy"),
        default="auto",
        help="what runs the model: embedded, on one device, or fastdeploy, an installed "
        "FastDeploy; auto is fastdeploy where it is installed and one device is not enough "
        "(default: auto)",
    )
    group.add_argument(
        "--seed", type=values.integer, help="seed of requests without one (default: 0)"
    )


def _add_chat_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template of conversations (default: what the folder has)",
    )
    group.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        default=False,
        help="let requests bring templates; one can keep a processor busy for ever",
    )
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        choices=("auto", "none", *TOOL_FORMATS),
        default="auto",
        help=f"how answers call tools: {', '.join(TOOL_FORMATS)}, none, or auto, by the template "
        "(default: auto)",
    )
    group.add_argument(
        "--reasoning-parser",
        metavar="NAME",
        choices=("auto", "none", *REASONING_FORMATS),
        default="auto",
        help=f"how answers reason: {', '.join(REASONING_FORMATS)}, none, or auto, by the template "
        "(default: auto)",
    )


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", type=values.host, default="127.0.0.1", help="interface (default: 127.0.0.1)"
    )
    group.add_argument(
        "--port", type=values.port, default=8000, help="0 takes any free port (default: 8000)"
    )
    group.add_argument(
        "--shutdown-timeout",
        metavar="S",
        type=values.seconds,
        default=30.0,
        help="seconds that running requests get after the first signal (default: 30)",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        type=values.key,
        action="append",
        help="key that requests must bring; may be repeated, and FD_DSA_API_KEY, with commas "
        "between keys, keeps it out of the list of processes (default: none is asked for)",
    )
    group.add_argument(
        "--max-body-size",
        metavar="BYTES",
        type=values.size,
        default=DEFAULT_MAX_BODY_BYTES,
        help="longest body of a request, for example 32M; longer ones are a 413 (default: 16M)",
    )
    group.add_argument(
        "--max-body-values",
        metavar="N",
        type=values.positive,
        default=DEFAULT_MAX_BODY_VALUES,
        help="values in a body, each number counted once, each text, name, list and object eight "
        "times; more are a 413 (default: 2097152)",
    )
    group.add_argument(
        "--max-answer-scores",
        metavar="N",
        type=values.positive,
        default=DEFAULT_MAX_ANSWER_SCORES,
        help="log-probabilities that an answer may have, over all of its choices; more are a 400 "
        "(default: 524288)",
    )
    group.add_argument(
        "--max-prompt-bytes",
        metavar="BYTES",
        type=values.size,
        default=None,
        help="longest text of a prompt, in UTF-8; longer ones are a 400 before they are tokenized "
        f"(default: {PROMPT_BYTES_PER_TOKEN} for each token of --max-model-len)",
    )
    group.add_argument(
        "--max-concurrency",
        metavar="N",
        type=values.positive,
        default=DEFAULT_MAX_CONCURRENCY,
        help="outputs in work and waiting at a time; more are a 429 (default: 512)",
    )
    group.add_argument(
        "--max-connections",
        metavar="N",
        type=values.positive,
        help="connections that may have a request in work; idle ones are closed to make room, any "
        "other request is a 503 (default: 4096, fewer where ulimit -n is lower)",
    )
    group.add_argument(
        "--allowed-host",
        metavar="NAME",
        type=values.host_name,
        action="append",
        help="name that the Host header of requests may have, beside localhost and --host; may be "
        "repeated, * allows all (default: checked on loopback addresses alone)",
    )
    group.add_argument(
        "--disable-ui",
        action="store_true",
        default=False,
        help="no page to talk to the model at /",
    )


def _add_logging_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="debug also shows tracebacks of a failed start (default: info)",
    )
    group.add_argument(
        "--log-requests",
        action="store_true",
        default=False,
        help="a line for each output that ended: counts and times, never texts",
    )
    group.add_argument(
        "--log-json",
        action="store_true",
        default=False,
        help="each line of the log is a JSON object",
    )


def _add_cache_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or fp8_ds_mla, also called fp8 (default: auto)",
    )
    group.add_argument(
        "--kv-cache-memory-bytes",
        metavar="BYTES",
        help="size of the caches, for example 8G (default: from free memory)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        metavar="SHARE",
        type=values.number,
        help="share of a GPU's memory that weights and caches may take (default: 0.9)",
    )
    group.add_argument(
        "--num-gpu-blocks-override",
        metavar="N",
        type=values.integer,
        help="number of cache blocks instead (on a CPU too)",
    )
    group.add_argument(
        "--block-size",
        metavar="N",
        type=values.integer,
        help="tokens per cache block (default: 64)",
    )
    prefix_caching = group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction
    )
    # set afterwards: some versions of Python add the default, which is a marker here
    prefix_caching.help = "share the cache blocks of prompts that begin alike (default: enabled)"


def _add_scheduler_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-model-len",
        metavar="N",
        type=values.integer,
        help="longest prompt plus output, tokens (default: the model's)",
    )
    group.add_argument(
        "--max-num-seqs",
        metavar="N",
        type=values.integer,
        help="sequences in a step (default: 64)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        metavar="N",
        type=values.integer,
        help="tokens in a step; longer prompts are split (default: 512 on a CPU)",
    )
    group.add_argument(
        "--target-inter-token-latency-ms",
        metavar="MS",
        type=values.number,
        default=DEFAULT_TARGET_MS,
        help="most time between two tokens of an answer while prompts are computed beside it, "
        f"0 for no target (default: {DEFAULT_TARGET_MS:g})",
    )
    chunked = group.add_argument("--enable-chunked-prefill", action=argparse.BooleanOptionalAction)
    chunked.help = "split prompts at --max-num-batched-tokens; always on (default: enabled)"


def _add_graph_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--enforce-eager",
        action="store_true",
        help="launch decode steps kernel by kernel, without CUDA graphs",
    )
    group.add_argument(
        "--cudagraph-capture-sizes",
        metavar="N",
        nargs="+",
        type=values.integer,
        help="rows of captured decode steps; fewer are padded (default: 1 2 4 8 16 24 ... up to "
        "--max-num-seqs)",
    )


def _add_parallel_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        type=values.positive,
        default=1,
        help="GPUs that share each layer (default: 1)",
    )
    group.add_argument(
        "--data-parallel-size",
        metavar="N",
        type=values.positive,
        default=1,
        help="copies of the attention layers, each with requests of its own (default: 1)",
    )
    group.add_argument(
        "--enable-expert-parallel",
        action="store_true",
        default=False,
        help="spread the experts over all GPUs",
    )


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument ([^:]+): ", r"\1: ", message))
