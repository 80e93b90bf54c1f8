"""The command `python -m fd_dsa.serve`, which serves with fd_dsa's engine or FastDeploy."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fd_dsa import __version__
from fd_dsa.command_line.failures import (
    EXIT_BAD_START,
    describe_import_error,
    describe_system_error,
    fail,
)
from fd_dsa.commands import own_command
from fd_dsa.config import HUB_NAME, EngineConfig
from fd_dsa.environment import check_address_space, local_url, process_environment
from fd_dsa.errors import (
    ConfigError,
    FdDsaError,
    describe_error,
    flag_error,
    is_out_of_memory,
    shorten,
)
from fd_dsa.serve.flag_sources import parse_args, unused_variables
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.flags import build_parser as build_parser
from fd_dsa.serve.heap import freeze_objects, keep_heap_trimmed, share_heap
from fd_dsa.serve.listener import connection_limit
from fd_dsa.serve.logs import set_up_logging
from fd_dsa.signals import discard, open_missing_streams, signal_end, signals_exit_at_once

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine
    from fd_dsa.startup.progress import StartupProgress

logger = logging.getLogger("fd_dsa.serve")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a model folder.

    Returns:
        Exit status: 0 after a drained shutdown, 1 after a failure while serving. 2 if the start
            fails, with the reason in one line on stderr. 130 or 143 after a signal during the
            start.
    """
    open_missing_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse_args(words)
    except ConfigError as error:
        return fail(str(error), EXIT_BAD_START)
    except BrokenPipeError:
        raise
    except OSError as error:
        # the text of --help cannot be written
        return fail(describe_system_error(error), EXIT_BAD_START)
    debug = args.log_level == "debug"
    set_up_logging(args.log_level, as_json=args.log_json)
    for line in unused_variables():
        logger.warning("%s", line)
    for flag, reason in args.not_needed.items():
        # as one argument, so that lines about other flags do not count as repeated
        logger.info("%s", f"{flag} is not needed here: {reason}")
    share_heap()
    keep_heap_trimmed()
    try:
        return _serve(args)
    except KeyboardInterrupt as stop:
        return fail("interrupted while starting", signal_end(stop)[1])
    except Exception as error:
        if debug:
            logger.debug("the start failed", exc_info=True)
        line, status = _start_failure(error, debug)
        return fail(_with_typed_size(line, words), status)


def _with_typed_size(line: str, words: Sequence[str]) -> str:
    """Return a message with the size of its flag also as typed, such as 32k."""
    flag = line.partition(":")[0]
    typed = re.search(rf"{re.escape(flag)}[= ]([\d.]+[kmg])(?!\S)", " ".join(words), re.IGNORECASE)
    return (
        line if typed is None else re.sub(r": got (\d+)", rf": got {typed[1]} (\1)", line, count=1)
    )


def _start_failure(error: Exception, debug: bool) -> tuple[str, int]:
    if isinstance(error, FdDsaError):
        return str(error), EXIT_BAD_START
    if isinstance(error, OSError) and error.errno is not None:
        return describe_system_error(error), EXIT_BAD_START
    if isinstance(error, ImportError):
        return describe_import_error(error), EXIT_BAD_START
    text = describe_error(error)
    if is_out_of_memory(error):
        return (
            f"not enough memory ({text}); lower --gpu-memory-utilization, --kv-cache-memory-bytes, "
            "--max-num-seqs or --max-num-batched-tokens",
            EXIT_BAD_START,
        )
    hint = "" if debug else " (--log-level debug shows the traceback)"
    return f"unexpected {text}{hint}", 1


def _serve(args: argparse.Namespace) -> int:
    started = time.monotonic()
    # imported here, so that --help and errors of flags are quick
    from fd_dsa.fastdeploy_plugin.launch.choice import choose_engine, refuse_for_embedded

    if args.download:
        _download(args)
    else:
        _refuse_hub_name(str(getattr(args, "model", "")))
    engine = args.engine
    if engine == "auto":
        engine, why = choose_engine(args)
        logger.info("engine %s: %s", engine, why)
    if engine == "fastdeploy":
        return _serve_with_fastdeploy(args)
    refuse_for_embedded(args)
    # a KeyboardInterrupt is lost in a callback, such as those of the locks of imports
    with signals_exit_at_once("fd_dsa: error: interrupted while starting"):
        return _show_plan(args) if args.dry_run else _serve_embedded(args, started)


def _download(args: argparse.Namespace) -> None:
    from fd_dsa.serve.download import AGAIN, download

    name = str(getattr(args, "model", ""))
    if not HUB_NAME.fullmatch(name):
        rule = "allowed is a name such as org/name"
        raise ConfigError(f"--download: got the model {shorten(name)}; {rule}")
    # the process would wait for threads of the download
    with signals_exit_at_once(f"fd_dsa: error: interrupted; {AGAIN}"):
        args.model = download(
            name,
            any_family=args.engine == "fastdeploy",
            allow_unknown=getattr(args, "allow_unknown_config_fields", False),
        )
    if not getattr(args, "served_model_name", ()):
        args.served_model_name = [name]


def _refuse_hub_name(name: str) -> None:
    """Refuse the name of a hub's model without --download, and name the command with it."""
    if HUB_NAME.fullmatch(name) and not os.path.lexists(name):
        raise flag_error(
            "model",
            name,
            "a local folder in Hugging Face format with config.json",
            f"if that is a model of a hub: {own_command('serve', name, '--download')}",
        )


def _serve_with_fastdeploy(args: argparse.Namespace) -> int:
    from fd_dsa.fastdeploy_plugin.launch.start import (
        become,
        check_import,
        passed_values,
        prepare,
        without_secrets,
    )
    from fd_dsa.serve.server import bind_socket, curl_command, try_line

    if not args.dry_run:
        # refuse a used address like the other engine, and resolve --port 0
        passed = passed_values(args.passed)
        with bind_socket(passed.get("host", args.host), passed.get("port", args.port)) as sock:
            args.port = sock.getsockname()[1]
    plan = prepare(args)
    if args.dry_run:
        changed = plan.environment.items() - process_environment().items()
        words = [f"{name}={value}" for name, value in sorted(changed)]
        _write_stdout(shlex.join([*words, *without_secrets(plan.command)]))
        return 0
    engine = check_import(plan)
    # folders of DeepSeek-V3.2 have no chat template, and a completion always works
    num_keys = plan.num_api_keys
    _print(
        f"fd_dsa {__version__} starts {plan.model_name} with {engine} on {plan.url}\n"
        f"max_model_len {plan.max_model_len}; {plan.url}/health answers 200 when it is ready.\n"
        f"{try_line(num_keys)}\n"
        + curl_command(plan.url, plan.model_name, plan.max_model_len, False, num_keys)
    )
    become(plan)


def _show_plan(args: argparse.Namespace) -> int:
    config = EngineConfig(**_fields_of(EngineConfig, args))
    import yaml

    from fd_dsa.serve.info import chat_formats
    from fd_dsa.startup.plan import make_plan

    plan, options = make_plan(config), _server_options(args)
    server = {
        "engine": "embedded",
        "host": args.host,
        "port": args.port,
        "num_api_keys": len(options.api_key),
        **options.limits(plan.max_model_len),
        "shutdown_timeout": args.shutdown_timeout,
        **chat_formats(plan.tokenizer, options),
    }
    described = yaml.safe_dump({**server, **plan.describe()}, sort_keys=False, allow_unicode=True)
    _write_stdout(f"# {plan.summary()}\n# {plan.memory.summary()}\n{described.rstrip()}")
    return 0


def _write_stdout(text: str) -> None:
    """Print a text, as far as there is a reader.

    Raises:
        OSError: stdout cannot be written, for example to a full disk.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        # otherwise the interpreter writes the text again at its exit, fails, and exits with 120
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def _serve_embedded(args: argparse.Namespace, started: float) -> int:
    check_address_space()
    config = EngineConfig(**_fields_of(EngineConfig, args))
    # imported here, so that --help and errors of flags are quick
    from fd_dsa.engine.async_engine import AsyncEngine
    from fd_dsa.serve.engine_process import EngineProcess
    from fd_dsa.serve.guard import host_rule
    from fd_dsa.serve.info import log_chat, server_info
    from fd_dsa.serve.server import DrainingServer, bind_socket
    from fd_dsa.serve.state import ServerState

    loaded: list[AsyncEngine] = []
    options = _server_options(args)

    def load(progress: StartupProgress) -> AsyncEngine:
        logger.info("fd_dsa %s: loading %s", __version__, config.model)
        process = EngineProcess(config, progress, args.log_level, args.log_json)
        loaded.append(AsyncEngine(process))
        log_chat(loaded[0].tokenizer, options)
        return loaded[0]

    with bind_socket(args.host, args.port) as sock:
        name = config.served_model_name[0]
        allowed = getattr(args, "allowed_host", None) or ()
        options = replace(options, hosts=host_rule(args.host, sock.getsockname()[0], allowed))

        def on_ready() -> None:
            freeze_objects()
            _print_ready(loaded[0], name, local_url(args.host, sock.getsockname()[1]), options)

        state = ServerState(
            config.served_model_name, lambda: server_info(config, loaded[0], options), options
        )
        # the imports of this process are part of the start
        state.startup.began = started
        return DrainingServer(state, load, args.shutdown_timeout, on_ready).serve_on(sock)


def _print_ready(engine: AsyncEngine, name: str, url: str, options: ServerOptions) -> None:
    from fd_dsa.serve.server import curl_command, try_line

    length, num_keys = engine.max_model_len, len(options.api_key)
    pages = {} if options.disable_ui else {"chat page": "/"}
    pages |= {"API page": "/docs", "metrics": "/metrics"}
    lines = [
        f"fd_dsa {__version__} serves {name} on {url}",
        *(f"  {page:<10} {url}{path}" for page, path in pages.items()),
        "  Ctrl-C     stops the server",
        try_line(num_keys),
        curl_command(url, name, length, engine.tokenizer.has_chat_template, num_keys),
    ]
    _print("\n".join(lines))


def _print(text: str) -> None:
    """Print a text. Errors of stdout, such as a full disk, do not end the server."""
    with suppress(OSError):
        _write_stdout(text)


def _fields_of(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names}


def _server_options(args: argparse.Namespace) -> ServerOptions:
    """Return the server's options from the flags, without the hosts, which depend on --host."""
    given = _fields_of(ServerOptions, args)
    given["max_connections"] = connection_limit(given.get("max_connections"))
    return ServerOptions(**given)
