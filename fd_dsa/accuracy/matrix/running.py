"""Runs the workload through one mode of the engine, and keeps what it answered in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_dsa.accuracy.embedded import open_model
from fd_dsa.accuracy.losses import token_losses, windows_of
from fd_dsa.accuracy.matrix.machine import providers
from fd_dsa.accuracy.matrix.modes import (
    BASE_ENGINE,
    INVARIANT,
    REFERENCE,
    FromWorkload,
    Mode,
)
from fd_dsa.accuracy.matrix.recording import Request, Trace, pack, record, unpack
from fd_dsa.accuracy.matrix.workload import Workload
from fd_dsa.accuracy.perplexity import default_text
from fd_dsa.config import EngineConfig
from fd_dsa.environment import batch_invariant, process_environment, quiet
from fd_dsa.errors import ConfigError, FdDsaError

_BLOCK_SIZE = 64
# exit status of a command that cannot begin
_REFUSED = 2
# fields of EngineConfig that decide how one sequence is computed
_ONE_SEQUENCE = {"device", "kv_cache_dtype", "max_num_batched_tokens"}
# requests that come twice, before the next ones: their blocks must stay in the cache, here one that
# is large enough for them, and one that is too small
_WARM_GROUP, _SMALL_WARM_GROUP = 32, 8


@dataclass(frozen=True)
class Recording:
    """One mode's answers.

    Attributes:
        mode: its name.
        traces: by key of the request.
        facts: `steps`, `preemptions`, `prefix_hits` and `prefix_queries` in tokens, `seconds`,
            `providers`, and `settings`, which must be the same for all modes of a matrix.
        losses: float64 [n]; of the tokens of a text, in nats, read in one pass. None where the
            mode changes nothing about one sequence.
    """

    mode: str
    traces: dict[str, Trace]
    facts: dict[str, Any]
    losses: NDArray[np.float64] | None = None


def engine_fields(mode: Mode, workload: Workload) -> dict[str, Any]:
    """Fields of EngineConfig for a mode, those that depend on the workload as numbers."""
    fields = {**BASE_ENGINE, **mode.engine}
    longest = workload.blocks(1, _BLOCK_SIZE)
    numbers = {
        FromWorkload.LONGEST_PROMPT: workload.longest_prompt,
        FromWorkload.LONGEST_SEQUENCE: workload.longest_sequence,
        FromWorkload.AMPLE_BLOCKS: workload.blocks(fields["max_num_seqs"], _BLOCK_SIZE),
        # odd: requests of one block each, with one to spare, fill it but for less than they need
        FromWorkload.FEW_BLOCKS: (longest + 1) | 1,
    }
    return {
        name: numbers[value] if isinstance(value, FromWorkload) else value
        for name, value in fields.items()
    }


def run_mode(
    mode: Mode,
    workload: Workload,
    model: Path,
    device: str,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Recording:
    """Answers of one mode, by an engine made for it.

    Raises:
        ConfigError: the model cannot be served in this mode.
    """
    from fd_dsa.engine.factory import build_engine
    from fd_dsa.runner.device import resolve_device

    if mode.short:
        workload = workload.without_long_ones()
    fields = {"device": device, **engine_fields(mode, workload)}
    config = EngineConfig(model=model, block_size=_BLOCK_SIZE, **fields)
    with quiet():
        engine = build_engine(config)
    begin = time.perf_counter()
    if mode.warm:
        group = _SMALL_WARM_GROUP if mode.short else _WARM_GROUP
        traces = _record_warm(engine, workload.requests, group, progress)
    else:
        traces = record(engine, workload.requests, progress)
    stats = engine.stats()
    facts = {
        "steps": stats.num_steps,
        "preemptions": stats.num_preemptions,
        "prefix_hits": stats.prefix_cache_hits,
        "prefix_queries": stats.prefix_cache_queries,
        "seconds": round(time.perf_counter() - begin, 1),
        "providers": providers(resolve_device(config.device)),
        "engine": fields,
    }
    # its caches would lie beside those of the next engine
    del engine
    losses = None
    if changes_one_sequence(mode):
        one = {name: fields[name] for name in _ONE_SEQUENCE}
        losses = _losses(model, workload.scale.perplexity_tokens, one)
    return Recording(mode.name, traces, facts, losses)


def changes_one_sequence(mode: Mode) -> bool:
    """False where a mode is about several requests, or about those that come again."""
    return mode.against is None or bool(mode.environment) or bool(_ONE_SEQUENCE & set(mode.engine))


def _losses(model: Path, num_tokens: int, fields: Mapping[str, Any]) -> NDArray[np.float64]:
    """Loss of every token of a text that the package carries, read in one pass."""
    with quiet():
        opened = open_model(model, **fields)
    context = min(num_tokens, opened.max_model_len)
    window = windows_of(opened, default_text(), context)[0]
    return token_losses(opened.sequence, window.token_ids)[window.first - 1 :]


def _record_warm(
    engine: Any, requests: Sequence[Request], size: int, progress: Callable[[int], None]
) -> dict[str, Trace]:
    """Answers of requests whose prompts, or halves of them, have been run just before.

    Args:
        size: requests that come together, twice.
    """
    traces: dict[str, Trace] = {}
    for start in range(0, len(requests), size):
        group = requests[start : start + size]
        record(engine, [_begun(number, request) for number, request in enumerate(group)])
        traces |= record(engine, group, progress)
    return traces


def _begun(number: int, request: Request) -> Request:
    """A request that leaves its prompt in the cache, or, every other one, half of it."""
    end = len(request.token_ids) if number % 2 else -(-len(request.token_ids) // 2)
    return replace(request, token_ids=request.token_ids[:end], max_tokens=1)


def missed(mode: Mode, facts: Mapping[str, Any]) -> str | None:
    """What a mode is about and did not happen, None where it did."""
    if mode.warm and not facts["prefix_hits"]:
        return "no token was found in the prefix cache"
    few = mode.engine.get("num_gpu_blocks_override") is FromWorkload.FEW_BLOCKS
    if few and not facts["preemptions"]:
        return "no request was preempted"
    return None


class Recordings:
    """A folder of recordings, one file a mode.

    Args:
        folder: made when the first one is kept.
        settings: what all of them must have been made with.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._settings = dict(settings)

    def get(self, mode: Mode) -> Recording | None:
        """The recording of a mode, None where there is none.

        Raises:
            ConfigError: it was made with other settings (names the first that differs), or its
                file is damaged.
        """
        path = self._path(mode)
        try:
            traces, facts, losses = unpack(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"--out: {path} is damaged ({error}); remove it") from error
        wanted = {**self._settings, "definition": _definition(mode)}
        kept = facts.get("settings", {})
        for name, now in wanted.items():
            if kept.get(name) != now:
                raise ConfigError(
                    f"--out: {path} was recorded with {name} {kept.get(name)!r}, this is {now!r}; "
                    "remove the folder, or give another one"
                )
        return Recording(mode.name, traces, facts, losses)

    def keep(self, mode: Mode, recording: Recording) -> Recording:
        """Write a recording, whole or not at all; returns it with its settings among its facts."""
        settings = {**self._settings, "definition": _definition(mode)}
        recording = replace(recording, facts={**recording.facts, "settings": settings})
        path = self._path(mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".unfinished-", delete=False
        ) as file:
            try:
                file.write(pack(recording.traces, recording.facts, recording.losses))
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        return recording

    def _path(self, mode: Mode) -> Path:
        """File of a mode."""
        return self._folder / f"{mode.name}.npz"


def settings_kept(folder: Path, workload: Workload) -> dict[str, Any]:
    """What the recordings of a folder were made with, as its reference says.

    Raises:
        ConfigError: there is no reference, or it answers other requests than these.
    """
    path = folder / f"{REFERENCE}.npz"
    try:
        settings = dict(unpack(path.read_bytes())[1]["settings"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--judge: {path} is no recording ({error!r})") from error
    if settings.get("workload") != workload.digest:
        raise ConfigError(
            f"--judge: {path} answers other requests than this model and these flags ask "
            "(--model, --quick)"
        )
    del settings["definition"]
    return settings


def _definition(mode: Mode) -> str:
    """A mode in words that change when it does."""
    engine = {**BASE_ENGINE, **mode.engine}
    parts = [f"{name}={getattr(value, 'name', value)}" for name, value in sorted(engine.items())]
    order = "1" if batch_invariant() else "0"
    environment = {INVARIANT: order, **mode.environment}
    parts += [f"{name}={value}" for name, value in sorted(environment.items())]
    return ", ".join([*parts, *(["warm"] if mode.warm else [])])


def run_elsewhere(mode: Mode, arguments: Sequence[str]) -> str | None:
    """Record a mode in a process of its own, which has the variables that the mode asks for.

    Args:
        mode: with an environment.
        arguments: of the matrix command.

    Returns:
        Why this machine cannot serve in this mode; None where it has been recorded.

    Raises:
        FdDsaError: the process failed on the way; its last line says why.
    """
    command = [sys.executable, "-m", "fd_dsa.accuracy", *arguments, "--record", mode.name]
    environment = {**process_environment(), **mode.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    said = lines[-1].removeprefix("fd_dsa: error: ")
    if done.returncode == _REFUSED and any(name in said for name in mode.environment):
        return said
    raise FdDsaError(f"mode {mode.name}: {said}")
