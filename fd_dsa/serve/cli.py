"""`python -m fd_dsa.serve`: flags in, engine built or FastDeploy started, exit status out."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fd_dsa import __version__
from fd_dsa.config import EngineConfig
from fd_dsa.errors import ConfigError, FdDsaError
from fd_dsa.serve.flags import parse_args

if TYPE_CHECKING:
    from fd_dsa.fastdeploy_plugin import launch

_EXIT_BAD_START = 2
_EXIT_INTERRUPTED = 130

logger = logging.getLogger("fd_dsa.serve")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a model folder; returns the exit status.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0 after a drained shutdown, 1 after a failure while serving, 2 when the start fails (one
        line on stderr says why), 130 when interrupted while loading.
    """
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        return _fail(str(error))
    debug = args.log_level == "debug"
    _set_up_logging(args.log_level)
    try:
        return _serve(args)
    except KeyboardInterrupt:
        return _fail("interrupted while starting", _EXIT_INTERRUPTED)
    except (FdDsaError, OSError) as error:
        if debug:
            logger.debug("the start failed", exc_info=True)
        return _fail(str(error))
    except Exception as error:
        if debug:
            logger.debug("the start failed", exc_info=True)
        hint = "" if debug else " (--log-level debug shows the traceback)"
        first_line = str(error).strip().partition("\n")[0]
        return _fail(f"unexpected {type(error).__name__}: {first_line}{hint}", 1)


def _fail(message: str, status: int = _EXIT_BAD_START) -> int:
    """Print the one line of a failed start."""
    sys.stderr.write(f"fd_dsa: error: {message}\n")
    return status


def _set_up_logging(level: str) -> None:
    """Log to stderr; uvicorn's own chatter only when debugging, no lines about /health."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    if level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    for name in ("asyncio", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(
        lambda record: " /health " not in record.getMessage()
    )


def _serve(args: argparse.Namespace) -> int:
    """Serve by the engine that the flags ask for."""
    started = time.monotonic()
    # late, so that --help and errors of flags are quick
    from fd_dsa.fastdeploy_plugin import launch

    flags, passed = vars(args), launch.PassedFlags.read(args.passed)
    engine = args.engine
    if engine == "auto":
        engine, why = launch.choose_engine(flags, args.given, passed)
        logger.info("engine %s: %s", engine, why)
    if engine == "fastdeploy":
        return _serve_with_fastdeploy(args, passed, started)
    launch.refuse_for_embedded(flags, args.given, passed)
    return _serve_embedded(args, started)


def _serve_with_fastdeploy(
    args: argparse.Namespace, passed: launch.PassedFlags, started: float
) -> int:
    """Start FastDeploy's server and stay with it."""
    from fd_dsa.fastdeploy_plugin import launch
    from fd_dsa.serve.server import bind_socket, curl_line

    plan = launch.prepare(vars(args), args.given, passed)
    if "port" in args.given and args.port:
        # the same refusal of a taken address as with the other engine
        bind_socket(passed.values.get("--host", args.host), args.port).close()

    def on_ready(ready: launch.Ready) -> None:
        # folders of DeepSeek-V3.2 come without a chat template, a completion always works
        curl = curl_line(plan.url, plan.model_name, plan.max_model_len, chat=False)
        sys.stdout.write(
            f"fd_dsa {__version__} serves {plan.model_name} with {ready.engine} on {plan.url} "
            f"(ready in {ready.seconds:.1f} s, max_model_len {plan.max_model_len}, API page "
            f"{plan.url}/docs, metrics {plan.metrics_url}, Ctrl-C stops). Try:\n{curl}\n"
        )
        sys.stdout.flush()

    return launch.launch(plan, started, on_ready)


def _serve_embedded(args: argparse.Namespace, started: float) -> int:
    """Take the address, build the engine, then serve."""
    config = _engine_config(args)
    # the server's packages are imported late, so that --help and errors of flags are quick
    from fd_dsa.serve.info import server_info
    from fd_dsa.serve.server import base_url, bind_socket, curl_line, run_server

    with bind_socket(args.host, args.port) as sock:
        from fd_dsa.engine.async_engine import AsyncEngine
        from fd_dsa.engine.factory import build_engine

        logger.info("fd_dsa %s: loading %s", __version__, config.model)
        engine = AsyncEngine(build_engine(config))
        name = config.served_model_name[0]

        def on_ready() -> None:
            url = base_url(args.host, sock)
            seconds = time.monotonic() - started
            chat = engine.tokenizer.has_chat_template
            sys.stdout.write(
                f"fd_dsa {__version__} serves {name} on {url} (ready in {seconds:.1f} s, "
                f"max_model_len {engine.max_model_len}, API page {url}/docs, Ctrl-C stops). "
                f"Try:\n{curl_line(url, name, engine.max_model_len, chat)}\n"
            )
            sys.stdout.flush()

        return run_server(
            engine,
            config.served_model_name,
            sock,
            shutdown_timeout_s=args.shutdown_timeout,
            on_ready=on_ready,
            info=lambda: server_info(config, engine),
        )


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's configuration from the flags that were given."""
    names = {field.name for field in fields(EngineConfig)}
    given: dict[str, Any] = {k: v for k, v in vars(args).items() if k in names}
    given["served_model_name"] = tuple(given.get("served_model_name", ()))
    return EngineConfig(**given)
