"""`selection`: recall of what the indexer chose, for every cache dtype, length and provider.

Which kernel serves an operator is settled once in a process, so every setting of providers but the
first has a process of its own, which is this command again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fd_dsa.accuracy import plots
from fd_dsa.accuracy.embedded import OpenModel, open_model, progress, read_config
from fd_dsa.accuracy.report import check_folder, show, write_files
from fd_dsa.accuracy.selection.measure import measure
from fd_dsa.accuracy.selection.needles import needle_texts
from fd_dsa.accuracy.selection.report import JSON_FILE, files, parts, pictured
from fd_dsa.config import EngineConfig
from fd_dsa.environment import OP_PROVIDERS, process_environment, quiet
from fd_dsa.errors import BackendUnavailable, ConfigError

CACHE_DTYPES = ("float32", "bfloat16", "fp8_ds_mla")
# the answer, and the end of the template behind it
_ANSWER_ROOM = 64
_LENGTHS_OF_TOPK = 8


@dataclass(frozen=True)
class Setting:
    """A device, and who serves its operators where there is a choice.

    Attributes:
        device: as `--device` of the server takes it, or a custom device of Paddle.
        operators: pairs such as `topk=triton`, as FD_DSA_OP_PROVIDER takes them; may be empty.
    """

    device: str
    operators: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting of a text such as `gpu` or `gpu,topk=triton`.

        Raises:
            ConfigError: an operator without a choice, or a provider that it has not.
        """
        device, *operators = text.split(",")
        for pair in operators:
            name, _, provider = pair.partition("=")
            if provider not in OP_PROVIDERS.get(name, ()):
                allowed = ", ".join(f"{op}={p}" for op, ps in OP_PROVIDERS.items() for p in ps)
                raise ConfigError(
                    f"--providers: got {pair!r} in {text!r}, allowed after the device: {allowed}"
                )
        # checks the name of the device
        EngineConfig(device=device)
        return cls(device, tuple(operators))

    def __str__(self) -> str:
        """As it was written."""
        return ",".join([self.device, *self.operators])


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the parser of `selection`."""
    parser = subparsers.add_parser(
        "selection",
        allow_abbrev=False,
        help="what the indexer chose, layer by layer",
        description="Hide numbers in texts, run them through the embedded engine, and tell for "
        "every layer how much of dense attention falls on the keys that its indexer chose, and "
        "whether the hidden number is among them.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a checkpoint (default: the demo model)"
    )
    parser.add_argument(
        "--lengths",
        metavar="N",
        nargs="+",
        type=int,
        help="tokens of a prompt, above index_topk (default: 8 x index_topk, or the context)",
    )
    _number(parser, "--texts", 8, "texts of each length")
    _number(parser, "--queries", 32, "tokens of a text, beside the answer's, to compare at")
    parser.add_argument(
        "--kv-cache-dtypes",
        nargs="+",
        metavar="DTYPE",
        choices=CACHE_DTYPES,
        default=CACHE_DTYPES,
        help="formats of the caches (default: float32 bfloat16 fp8_ds_mla)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="DEVICE[,OP=PROVIDER]",
        default=("auto",),
        help="where the model runs and whose kernels serve: cpu, gpu, gpu,topk=triton, "
        "gpu,topk=custom_op (default: auto)",
    )
    parser.add_argument(
        "--index-topk", metavar="K", type=int, help="keys to choose (default: the model's number)"
    )
    _number(parser, "--max-num-batched-tokens", 512, "tokens of a chunk of the prompt")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of texts and random sets")
    parser.add_argument("--out", metavar="DIR", help="folder for report, JSON and pictures")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0 when at least one setting could be measured.

    Raises:
        ConfigError: a flag, or nothing could be measured; the reason of the first failure.
        BackendUnavailable: the same for a device or a package that is missing.
    """
    settings = [Setting.parse(text) for text in args.providers]
    for name, least in (("texts", 1), ("queries", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name}: got {getattr(args, name)}, allowed: at least {least}")
    args.lengths = _checked_lengths(args)
    if args.out is not None:
        plots.require()
        check_folder(Path(args.out))
    runs: list[dict[str, Any]] = []
    for setting in settings:
        here = setting is settings[0] and not setting.operators
        runs += _runs_here(args, setting) if here else _runs_in_child(args, setting)
    if not any("layers" in found for found in runs):
        raise ConfigError(runs[0]["unavailable"])
    for found in runs:
        if found is not pictured(runs):
            found.pop("example", None)
    result = {"settings": _settings(args), "runs": runs}
    if args.out is not None:
        write_files(Path(args.out), files(result))
    show(parts(result))
    return 0


def _runs_here(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """A JSON object for each cache dtype and length, or one that says why a dtype has none."""
    runs = []
    with quiet():
        for dtype in args.kv_cache_dtypes:
            known = {"provider": str(setting), "kv_cache_dtype": dtype}
            try:
                model = open_model(
                    args.model,
                    index_topk=args.index_topk,
                    max_model_len=max(args.lengths) + _ANSWER_ROOM,
                    device=setting.device,
                    kv_cache_dtype=dtype,
                    max_num_batched_tokens=args.max_num_batched_tokens,
                )
                known["provider"] = str(Setting(model.device, setting.operators))
                runs += [known | _measured(args, model, length) for length in args.lengths]
            except (ConfigError, BackendUnavailable) as error:
                if len(args.kv_cache_dtypes) == len(args.providers) == 1:
                    raise
                runs.append(known | {"unavailable": str(error)})
    return runs


def _checked_lengths(args: argparse.Namespace) -> list[int]:
    """Tokens of the prompts.

    Raises:
        ConfigError: one at which nothing is selected, or beyond the model's context.
    """
    config = read_config(args.model, args.index_topk)
    topk, most = config.index_topk, config.max_position_embeddings - _ANSWER_ROOM
    lengths = args.lengths or [min(_LENGTHS_OF_TOPK * topk, most)]
    for length in lengths:
        if length <= topk:
            raise ConfigError(
                f"--lengths: got {length}, allowed: above index_topk {topk}, since up to there "
                "every key is chosen"
            )
        if length > most:
            raise ConfigError(
                f"--lengths: got {length}, allowed: at most {most}, since the answer needs "
                f"{_ANSWER_ROOM} tokens of the context too"
            )
    return list(lengths)


def _measured(args: argparse.Namespace, model: OpenModel, length: int) -> dict[str, Any]:
    """Figures of one length."""
    from fd_dsa.ops._provider import device_kind, provider_table

    what = f"{model.device}, {model.engine_config.cache_dtype} caches, {length} tokens"
    texts = needle_texts(model, length, args.texts, args.seed)
    with progress(what, args.texts) as tell:
        figures, example = measure(
            model, texts, num_queries=args.queries, seed=args.seed, tell=tell
        )
    kind = device_kind(model.sequence.runner.caches[0])
    served = {op: by[kind] for op, by in provider_table().items() if kind in by}
    return {
        "device": model.device,
        "length": length,
        "index_topk": model.model_config.index_topk,
        "served_by": served,
        "layers": [figure.to_json() for figure in figures],
        "example": asdict(example),
    }


def _runs_in_child(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """`_runs_here` in a process of its own, in which the setting's providers are asked for."""
    environment = process_environment()
    if setting.operators:
        environment["FD_DSA_OP_PROVIDER"] = ",".join(setting.operators)
    with tempfile.TemporaryDirectory(prefix="fd_dsa_") as folder:
        command = [sys.executable, "-m", "fd_dsa.accuracy", "selection"]
        command += _flags(args, setting.device, folder)
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with progress(f"{setting}, in a process of its own", 1):
            done = subprocess.run(command, env=environment, text=True, check=False, **pipes)
        file = Path(folder) / JSON_FILE
        if done.returncode or not file.is_file():
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            reason = lines[-1].removeprefix("fd_dsa: error: ")
            return [
                {"provider": str(setting), "kv_cache_dtype": dtype, "unavailable": reason}
                for dtype in args.kv_cache_dtypes
            ]
        runs: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["runs"]
    for found in runs:
        found["provider"] = ",".join([found["provider"], *setting.operators])
    return runs


def _flags(args: argparse.Namespace, device: str, folder: str) -> list[str]:
    """Arguments of the child that measures one device."""
    flags = [] if args.model is None else [args.model]
    for name in ("texts", "queries", "max_num_batched_tokens", "seed", "index_topk"):
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    flags += ["--lengths", *map(str, args.lengths)]
    return [
        *flags,
        "--kv-cache-dtypes",
        *args.kv_cache_dtypes,
        "--providers",
        device,
        "--out",
        folder,
    ]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the figures, for selection.json."""
    return {
        "model": EngineConfig(model=args.model).model_path.name,
        "texts": args.texts,
        "queries": args.queries,
        "seed": args.seed,
        "max_num_batched_tokens": args.max_num_batched_tokens,
    }


def _number(parser: argparse.ArgumentParser, flag: str, default: int, text: str) -> None:
    """A flag that takes a number."""
    parser.add_argument(
        flag, metavar="N", type=int, default=default, help=f"{text} (default: {default})"
    )
