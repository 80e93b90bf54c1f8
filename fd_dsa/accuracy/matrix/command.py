"""The command: flags, recordings mode by mode, report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fd_dsa.accuracy import plots, report, scorer
from fd_dsa.accuracy.matrix import tables
from fd_dsa.accuracy.matrix.judging import Judgement, judge
from fd_dsa.accuracy.matrix.machine import settings_of, why_not
from fd_dsa.accuracy.matrix.modes import MODES, QUICK_MODES, Mode, choose
from fd_dsa.accuracy.matrix.running import (
    Recording,
    Recordings,
    run_elsewhere,
    run_mode,
    settings_kept,
)
from fd_dsa.accuracy.matrix.workload import FULL, QUICK, Scale, Workload, make_workload
from fd_dsa.accuracy.prompts import set_warning
from fd_dsa.accuracy.types import REPORT_FILE
from fd_dsa.config import EngineConfig
from fd_dsa.environment import prepare_cpu_runtime, quiet
from fd_dsa.errors import FdDsaError

_RECORDINGS = "recordings"
_BAD = 1


def add_parser(subparsers: Any) -> None:
    """Add the parser of `matrix`."""
    parser = subparsers.add_parser(
        "matrix", help="one model through every mode of the engine", allow_abbrev=False
    )
    parser.add_argument("--model", metavar="DIR", help="folder (default: the demo model)")
    parser.add_argument("--device", default="auto", help="cpu, gpu, or auto (default: auto)")
    parser.add_argument(
        "--modes",
        metavar="LIST",
        help=f"of {', '.join(mode.name for mode in MODES)} (default: all that this machine has, "
        f"with --quick {QUICK_MODES})",
    )
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that it runs")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="matrix",
        help="folder of the run; modes that it holds are not run again (default: matrix)",
    )
    apart = parser.add_mutually_exclusive_group()
    apart.add_argument(
        "--answers-only",
        action="store_true",
        help="keep the answers and judge them later, or on a machine that has the checkers",
    )
    apart.add_argument(
        "--judge",
        action="store_true",
        help="judge the answers that --out holds, wherever they were made; run nothing",
    )
    parser.add_argument("--record", metavar="MODE", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Record every mode that is missing, judge, report.

    Returns:
        0 when every exact mode agrees to the token, 1 when one differs or was not reached.

    Raises:
        ConfigError: a flag, the model or the folder; nothing was run then.
    """
    if not (args.answers_only or args.record):
        plots.require()
    modes = choose(args.modes or (QUICK_MODES if args.quick else None))
    out = Path(args.out)
    report.check_folder(out)
    config = EngineConfig(model=args.model, device=args.device)
    prepare_cpu_runtime()
    from fd_dsa.runner.device import resolve_device

    workload = _workload(config, QUICK if args.quick else FULL)
    if args.judge:
        return _judge_kept(out, modes, workload)
    device = resolve_device(args.device)
    settings = settings_of(config.model_path, device) | {"workload": workload.digest}
    kept = Recordings(out / _RECORDINGS, settings)
    if args.record is not None:
        (mode,) = (mode for mode in MODES if mode.name == args.record)
        kept.keep(mode, run_mode(mode, workload, config.model_path, device))
        return 0
    skipped = {m.name: reason for m in modes if (reason := why_not(m, device)) is not None}
    wanted = [mode for mode in modes if mode.name not in skipped]
    if not args.answers_only:
        scorer.ready(workload.prompts)
    found = _record_all(wanted, kept, workload, config.model_path, device, args.arguments, skipped)
    if args.answers_only:
        report.show([f"Recorded in {out}: {', '.join(found)}; judge them with --judge."])
        return 0
    return _judge(out, modes, workload, found, skipped, settings)


def _judge(
    out: Path,
    modes: Sequence[Mode],
    workload: Workload,
    found: dict[str, Recording],
    skipped: dict[str, str],
    settings: dict[str, Any],
) -> int:
    """Judge and report; the exit status."""
    lines = judge(modes, workload, found, skipped)
    _report(out, lines, workload, settings)
    return _BAD if any(line.failed for line in lines) else 0


def _judge_kept(out: Path, modes: Sequence[Mode], workload: Workload) -> int:
    """Judge the recordings of a folder; what is not there was not run.

    Raises:
        ConfigError: there is no reference, it answers other requests, or another recording was
            made with other settings than it.
    """
    settings = settings_kept(out / _RECORDINGS, workload)
    kept = Recordings(out / _RECORDINGS, settings)
    scorer.ready(workload.prompts)
    found = {mode.name: recording for mode in modes if (recording := kept.get(mode)) is not None}
    skipped = {mode.name: "not recorded" for mode in modes if mode.name not in found}
    return _judge(out, modes, workload, found, skipped, settings)


def _workload(config: EngineConfig, scale: Scale) -> Workload:
    """What a model is asked."""
    from fd_dsa.accuracy.retrieval.plan import Limits
    from fd_dsa.engine.tokenizer import Tokenizer
    from fd_dsa.models.config import ModelConfig

    folder = config.model_path
    model = ModelConfig.from_folder(folder)
    limits = Limits(model.index_topk, model.max_position_embeddings)
    return make_workload(folder, Tokenizer.from_folder(folder), limits, scale)


def _record_all(
    modes: Sequence[Mode],
    kept: Recordings,
    workload: Workload,
    model: Path,
    device: str,
    arguments: Sequence[str],
    skipped: dict[str, str],
) -> dict[str, Recording]:
    """A recording of each mode, those that are kept already among them.

    What turns out not to run here joins `skipped`, with the reason.
    """
    # all are looked at before the first is run: one that does not belong here ends it at once
    found = {mode.name: recording for mode in modes if (recording := kept.get(mode)) is not None}
    with quiet(), _progress(len(modes), len(found)) as note:
        for mode in (mode for mode in modes if mode.name not in found):
            note(mode.name, 0)
            if mode.environment:
                refused = run_elsewhere(mode, arguments)
                if refused is not None:
                    skipped[mode.name] = refused
                    continue
                recorded = kept.get(mode)
                if recorded is None:
                    raise FdDsaError(f"mode {mode.name}: its process has kept no recording")
                recording = recorded
            else:
                tell = _teller(note, mode)
                recording = kept.keep(mode, run_mode(mode, workload, model, device, tell))
            found[mode.name] = recording
            note(mode.name, None)
    return found


def _teller(note: Callable[[str, int | None], None], mode: Mode) -> Callable[[int], None]:
    """What a recording calls after each step."""
    return lambda tokens: note(mode.name, tokens)


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[str, int | None], None]]:
    """A progress bar on stderr; the function takes a mode's new tokens, None at its end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("modes, {task.fields[state]}"),
        TimeElapsedColumn(),
    )
    tokens: dict[str, int] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("matrix", total=total, completed=done, state="")

        def note(mode: str, new: int | None) -> None:
            tokens[mode] = tokens.get(mode, 0) + (new or 0)
            state = f"{mode}: {tokens[mode]:,} tokens"
            progress.update(bar, advance=int(new is None), state=state)

        yield note


def _report(
    out: Path, lines: Sequence[Judgement], workload: Workload, settings: dict[str, Any]
) -> None:
    """Print the report and write it."""
    facts = workload.facts()
    shown = tables.parts(lines, facts)
    warning = set_warning(workload.prompts)
    if warning:
        shown.append(f"IFEval: {warning}.")
    model = f"{settings['model']} on {settings['device']}, {settings['machine']}"
    texts = {
        tables.DATA_FILE: report.as_json(
            {"settings": settings, "workload": facts, "modes": [line.to_json() for line in lines]}
        ),
        REPORT_FILE: report.page(f"Matrix: {model}", shown),
        **tables.pictures(lines),
    }
    report.write_files(out, texts)
    report.show(shown)
    report.show([f"Written to {out}: {', '.join(texts)}."])
