"""Flags of `python -m fd_dsa.serve`; `--help` imports neither Paddle nor the server."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

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


def _value(
    group: argparse._ArgumentGroup,
    flag: str,
    text: str,
    kind: Callable[[str], Any] = str,
    default: Any = argparse.SUPPRESS,
    **more: Any,
) -> None:
    """Add a flag that takes a value.

    Args:
        group: of `--help`.
        flag: its name, then its metavar where `--help` shows one.
        text: of `--help`.
        kind: reads the value.
        default: none for flags of the engine, whose configuration has it.
        more: of `add_argument`.
    """
    name, _, metavar = flag.partition(" ")
    group.add_argument(name, metavar=metavar or None, type=kind, default=default, help=text, **more)


def _switch(group: argparse._ArgumentGroup, flag: str, text: str, default: Any = False) -> None:
    """Add a flag without a value."""
    group.add_argument(flag, action="store_true", default=default, help=text)


def _on_or_off(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    """Add a flag that has a form with `no` too."""
    action = group.add_argument(flag, action=argparse.BooleanOptionalAction)
    # set afterwards: some versions of Python add the default, which is a marker here
    action.help = text


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    folder = "folder in Hugging Face format (default: the demo model of the package)"
    group.add_argument("positional_model", metavar="MODEL", nargs="?", help=folder)
    _value(group, "--model DIR", "the same as MODEL")
    name = "name for the `model` field of requests; may be repeated (default: folder name)"
    _value(group, "--served-model-name NAME", name, action="append")
    _value(group, "--tokenizer DIR", "folder of the tokenizer (default: the model's)")
    formats = "auto, safetensors, or dummy for random weights (default: auto)"
    _value(group, "--load-format FORMAT", formats)
    topk = "keys that the indexer chooses for a token (default: the model's)"
    _value(group, "--index-topk N", topk, values.integer)
    device = "where the model runs; auto is a GPU where Paddle has one (default: auto)"
    _value(group, "--device", device, choices=DEVICES)
    _value(group, "--dtype", "auto, float32 or bfloat16 (default: auto; CPU: float32)")
    _value(
        group,
        "--engine",
        "what runs the model: embedded, on one device, or fastdeploy, an installed FastDeploy; "
        "auto is fastdeploy where it is installed and one device is not enough (default: auto)",
        default="auto",
        choices=("auto", "embedded", "fastdeploy"),
    )
    _value(group, "--seed", "seed of requests without one (default: 0)", values.integer)


def _add_chat_flags(group: argparse._ArgumentGroup) -> None:
    template = "Jinja template of conversations (default: what the folder has)"
    _value(group, "--chat-template FILE", template)
    _switch(
        group,
        "--trust-request-chat-template",
        "let requests bring templates; one can keep a processor busy indefinitely",
    )
    for flag, what, formats in (
        ("--tool-call-parser NAME", "call tools", TOOL_FORMATS),
        ("--reasoning-parser NAME", "reason", REASONING_FORMATS),
    ):
        text = f"how answers {what}: {', '.join(formats)}, none, or auto, by the template "
        text += "(default: auto)"
        _value(group, flag, text, default="auto", choices=("auto", "none", *formats))


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    _value(group, "--host", "interface (default: 127.0.0.1)", values.host, "127.0.0.1")
    _value(group, "--port", "0 takes any free port (default: 8000)", values.port, 8000)
    patience = "seconds that running requests get after the first signal (default: 30)"
    _value(group, "--shutdown-timeout S", patience, values.seconds, 30.0)
    _value(
        group,
        "--api-key KEY",
        "key that requests must bring; may be repeated, and FD_DSA_API_KEY, with commas between "
        "keys, keeps it out of the list of processes (default: none is asked for)",
        values.key,
        action="append",
    )
    _value(
        group,
        "--max-body-size BYTES",
        "longest body of a request, for example 32M; longer ones are a 413 (default: 16M)",
        values.size,
        DEFAULT_MAX_BODY_BYTES,
    )
    _value(
        group,
        "--max-body-values N",
        "values in a body, each number counted once, each text, name, list and object eight "
        "times; more are a 413 (default: 2097152)",
        values.positive,
        DEFAULT_MAX_BODY_VALUES,
    )
    _value(
        group,
        "--max-answer-scores N",
        "log-probabilities that an answer may have, over all of its choices; more are a 400 "
        "(default: 524288)",
        values.positive,
        DEFAULT_MAX_ANSWER_SCORES,
    )
    _value(
        group,
        "--max-prompt-bytes BYTES",
        "longest text of a prompt, in UTF-8; longer ones are a 400 before they are tokenized "
        f"(default: {PROMPT_BYTES_PER_TOKEN} for each token of --max-model-len)",
        values.size,
        None,
    )
    outputs = "running and waiting outputs at a time; more are a 429 (default: 512)"
    _value(group, "--max-concurrency N", outputs, values.positive, DEFAULT_MAX_CONCURRENCY)
    _value(
        group,
        "--max-connections N",
        "connections that may have a request in progress; idle ones are closed to make room, any "
        "other request is a 503 (default: 4096, fewer where ulimit -n is lower)",
        values.positive,
    )
    _value(
        group,
        "--allowed-host NAME",
        "name that the Host header of requests may have, beside localhost and --host; may be "
        "repeated, * allows all (default: checked on loopback addresses alone)",
        values.host_name,
        action="append",
    )
    _switch(group, "--disable-ui", "no page to talk to the model at /")


def _add_logging_flags(group: argparse._ArgumentGroup) -> None:
    levels = "debug also shows tracebacks of a failed start (default: info)"
    choices = ("debug", "info", "warning", "error")
    _value(group, "--log-level", levels, default="info", choices=choices)
    lines = "a line for each output that ended: counts and times, never texts"
    _switch(group, "--log-requests", lines)
    _switch(group, "--log-json", "each line of the log is a JSON object")


def _add_cache_flags(group: argparse._ArgumentGroup) -> None:
    dtypes = "auto, float32, bfloat16 or fp8_ds_mla, also called fp8 (default: auto)"
    _value(group, "--kv-cache-dtype DTYPE", dtypes)
    size = "size of the caches, for example 8G (default: from free memory)"
    _value(group, "--kv-cache-memory-bytes BYTES", size)
    share = "share of a GPU's memory that weights and caches may take (default: 0.9)"
    _value(group, "--gpu-memory-utilization SHARE", share, values.number)
    blocks = "number of cache blocks instead (on a CPU too)"
    _value(group, "--num-gpu-blocks-override N", blocks, values.integer)
    _value(group, "--block-size N", "tokens per cache block (default: 64)", values.integer)
    _on_or_off(
        group,
        "--enable-prefix-caching",
        "share the cache blocks of prompts that begin alike (default: enabled)",
    )


def _add_scheduler_flags(group: argparse._ArgumentGroup) -> None:
    length = "longest prompt plus output, tokens (default: the model's)"
    _value(group, "--max-model-len N", length, values.integer)
    _value(group, "--max-num-seqs N", "sequences in a step (default: 64)", values.integer)
    tokens = "tokens in a step; longer prompts are split (default: 512 on a CPU)"
    _value(group, "--max-num-batched-tokens N", tokens, values.integer)
    _value(
        group,
        "--target-inter-token-latency-ms MS",
        "most time between two tokens of an answer while prompts are computed beside it, "
        f"0 for no target (default: {DEFAULT_TARGET_MS:g})",
        values.number,
        DEFAULT_TARGET_MS,
    )
    chunks = "split prompts at --max-num-batched-tokens; always on (default: enabled)"
    _on_or_off(group, "--enable-chunked-prefill", chunks)


def _add_graph_flags(group: argparse._ArgumentGroup) -> None:
    eager = "launch decode steps kernel by kernel, without CUDA graphs"
    _switch(group, "--enforce-eager", eager, argparse.SUPPRESS)
    _value(
        group,
        "--cudagraph-capture-sizes N",
        "rows of captured decode steps; fewer are padded (default: 1 2 4 8 16 24 ... up to "
        "--max-num-seqs)",
        values.integer,
        nargs="+",
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
    copies = "copies of the attention layers, each with requests of its own (default: 1)"
    _value(group, "--data-parallel-size N", copies, values.positive, 1)
    _switch(group, "--enable-expert-parallel", "spread the experts over all GPUs")


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument ([^:]+): ", r"\1: ", message))
