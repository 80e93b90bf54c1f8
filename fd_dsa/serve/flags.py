"""Flags of `python -m fd_dsa.serve`; `--help` imports neither Paddle nor the server."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from fd_dsa import __version__
from fd_dsa.config import DEVICES
from fd_dsa.errors import ConfigError


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed flags; those of the engine are there only when they were given.

    Two names more than flags: `given`, the names of those that stand in `argv`, and `passed`, the
    arguments after `--`, which are for FastDeploy.

    Raises:
        ConfigError: an unknown flag (with the nearest known one), or a value of a wrong form.
    """
    own, passed = _split(argv)
    parser = build_parser()
    args, rest = parser.parse_known_args(own)
    if rest:
        raise ConfigError(_unknown_argument(parser, rest[0]))
    given = _given(own)
    positional = vars(args).pop("positional_model", None)
    if positional is not None:
        if getattr(args, "model", positional) != positional:
            raise ConfigError(
                f"--model: got {args.model!r} and the folder {positional!r}; give one of them"
            )
        args.model = positional
    args.given = frozenset("model" if name == "positional_model" else name for name in given)
    args.passed = tuple(passed)
    return args


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What stands before and after the first `--`."""
    if "--" not in argv:
        return argv, ()
    place = list(argv).index("--")
    return argv[:place], argv[place + 1 :]


def _given(argv: Sequence[str]) -> set[str]:
    """Names of the flags in `argv`, their defaults left aside."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(argv)[0]))


def build_parser() -> argparse.ArgumentParser:
    """The parser, flags grouped as in `--help`."""
    parser = _Parser(
        prog="python -m fd_dsa.serve",
        usage="%(prog)s [MODEL] [flags] [-- flags of FastDeploy]",
        description="Serve a DeepSeek-V3.2 or GLM-5 shaped checkpoint over the OpenAI API.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"fd_dsa {__version__}")
    _add_model_flags(parser.add_argument_group("model"))
    _add_server_flags(parser.add_argument_group("server"))
    _add_cache_flags(parser.add_argument_group("cache"))
    _add_scheduler_flags(parser.add_argument_group("scheduler"))
    _add_parallel_flags(parser.add_argument_group("parallel (with FastDeploy)"))
    parser.add_argument_group("logging").add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="debug also shows tracebacks of a failed start (default: info)",
    )
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
    group.add_argument("--seed", type=_integer, help="seed of requests without one (default: 0)")


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="interface (default: 127.0.0.1)")
    group.add_argument(
        "--port", type=_port, default=8000, help="0 takes any free port (default: 8000)"
    )
    group.add_argument(
        "--shutdown-timeout",
        metavar="S",
        type=_seconds,
        default=30.0,
        help="seconds that running requests get after the first signal (default: 30)",
    )


def _add_cache_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or fp8_ds_mla (default: auto)",
    )
    group.add_argument(
        "--kv-cache-memory-bytes",
        metavar="BYTES",
        help="size of the caches, for example 8G (default: from free memory)",
    )
    group.add_argument(
        "--num-gpu-blocks-override",
        metavar="N",
        type=_integer,
        help="number of cache blocks instead (on a CPU too)",
    )
    group.add_argument(
        "--block-size", metavar="N", type=_integer, help="tokens per cache block (default: 64)"
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
        type=_integer,
        help="longest prompt plus output, tokens (default: the model's)",
    )
    group.add_argument(
        "--max-num-seqs", metavar="N", type=_integer, help="sequences in a step (default: 64)"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        metavar="N",
        type=_integer,
        help="tokens in a step; longer prompts are split (default: 512 on a CPU)",
    )


def _add_parallel_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        type=_integer,
        default=1,
        help="GPUs that share each layer (default: 1)",
    )
    group.add_argument(
        "--data-parallel-size",
        metavar="N",
        type=_integer,
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


def _integer(text: str) -> int:
    """A whole number; its range is checked by the engine's configuration."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a whole number") from None


def _port(text: str) -> int:
    """A TCP port."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is 0..65535")
    return int(text)


def _seconds(text: str) -> float:
    """A duration."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a number of seconds, 0 or more")
    return value


def _unknown_argument(parser: argparse.ArgumentParser, argument: str) -> str:
    """What to say about an argument that the parser does not know."""
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; only one model folder is served at a time"
    flag = argument.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
    return f"unknown flag {flag}; {hint}"
