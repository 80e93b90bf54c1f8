"""`python -m fd_dsa.doctor`: versions, operator providers and a self-check."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import textwrap
from importlib.util import find_spec
from typing import Any

from fd_dsa import __version__
from fd_dsa.command_line.failures import fail, reports_failures
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.values import number
from fd_dsa.commands import (
    extra_command,
    own_command,
    pip_command,
    python_command,
    triton_command,
)
from fd_dsa.config import EngineConfig
from fd_dsa.environment import (
    has_nvidia_gpu,
    installed_version,
    nvidia_smi,
    prepare_cpu_runtime,
    quiet,
    usable_cpus,
)
from fd_dsa.errors import (
    BackendUnavailable,
    ConfigError,
    FdDsaError,
    describe_error,
    renaming,
    shorten,
)

_PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "triton", "numpy")
_NEEDED = ("numpy", "paddle")
_OK, _BAD = 0, 1
_NO_WIDTH = 1 << 20


def build_parser() -> Parser:
    parser = Parser(
        prog=own_command("doctor"),
        description="Report device, versions and providers, and check every operator here.",
    )
    parser.add_argument("--device", help="cpu, gpu:0 or a custom device; default: the best one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--plan",
        metavar="FOLDER",
        help="print what each GPU would hold of a model with this config.json, without checks",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        type=number(int, 1),
        default=1,
        help="GPUs of --plan; default: 1",
    )
    parser.add_argument(
        "--allow-unknown-config-fields",
        action="store_true",
        help="with --plan: accept fields of config.json that fd_dsa does not know",
    )
    parser.add_argument(
        "--fastdeploy",
        action="store_true",
        help="list what the plug-in looks for in FastDeploy; status 1 unless fd_dsa serves there",
    )
    return parser


@reports_failures
def main(arguments: list[str]) -> int:
    """Examine this machine.

    Returns:
        0 if everything passed, 1 if not, 2 for flags that cannot be read.
    """
    args = build_parser().parse_args(arguments)
    _check_together(args)
    if args.plan is not None:
        return _plan(args)
    try:
        if args.fastdeploy:
            # imported late, so that --help is quick
            from fd_dsa.fastdeploy_plugin.launch.choice import require_fastdeploy

            require_fastdeploy()
        with quiet():
            found = examine(args.device)
    except FdDsaError as error:
        return fail(str(error), _BAD)
    text = json.dumps(found, indent=1) + "\n" if args.json else as_text(found, args.fastdeploy)
    sys.stdout.write(text)
    serves = found["fastdeploy"]["serves"] or not args.fastdeploy
    return _OK if found["healthy"] and serves else _BAD


def _check_together(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect, with or without --plan."""
    of_plan = {
        "--tensor-parallel-size": args.tensor_parallel_size != 1,
        "--allow-unknown-config-fields": args.allow_unknown_config_fields,
    }
    of_checks = {"--device": args.device is not None, "--fastdeploy": args.fastdeploy}
    wrong, rule = (
        (of_plan, "give --plan FOLDER, too")
        if args.plan is None
        else (of_checks, "not together with --plan, which makes no checks; leave one of them out")
    )
    for flag, is_given in wrong.items():
        if is_given:
            raise ConfigError(f"{flag}: {rule}")


def _plan(args: argparse.Namespace) -> int:
    require_packages()
    from fd_dsa.doctor.plan import as_lines, plan

    require_triton()
    with renaming({"--model": "--plan"}), quiet():
        allow_unknown = args.allow_unknown_config_fields
        found = plan(args.plan, args.tensor_parallel_size, allow_unknown=allow_unknown)
    text = json.dumps(found, indent=1) if args.json else "\n".join(as_lines(found))
    sys.stdout.write(f"{text}\n")
    return _OK


def examine(device: str | None = None) -> dict[str, Any]:
    """Collect everything that the doctor reports, as plain JSON values.

    Args:
        device: place whose operators are checked in addition to the CPU. None = the best one
            available.

    Returns:
        `version`, `machine`, `device`, `packages` (name -> version, "" = not installed),
        `broken_packages` (module -> error of its import), `gpu` (or None) and `fastdeploy` (see
        `fastdeploy.facts`). `kernels` is the mode of Triton kernels: compiled, interpreted, or
        unavailable without Triton. `note` names the checks that were not run, with the reason.
        `checks` is a list (see `run_checks`, and on a device `check_float32`). `custom_ops` has
        `state`, `reason` and `path` of fd_dsa_ops. `graphs` is explained at `graph_facts`.
        `healthy` depends on `checks`, `custom_ops` and `broken_packages`.

    Raises:
        ConfigError: FD_DSA_OP_PROVIDER has an invalid value.
        BackendUnavailable: Paddle, Triton or the requested device is missing.
    """
    device = device_to_check(device)
    gpu, cpus = _gpu(), f"{usable_cpus()} processors"
    # imported after the check above, because these modules import Paddle
    from fd_dsa import custom_ops
    from fd_dsa.doctor.checks import check_float32, run_checks
    from fd_dsa.doctor.fastdeploy import examination
    from fd_dsa.doctor.packages import broken_packages

    kernels = _kernels(device)
    interpreting = kernels != "compiled"
    with examination() as fastdeploy_facts:
        checks = run_checks(device)
        if device != "cpu":
            checks.append(check_float32(device))
        fastdeploy = fastdeploy_facts()
    build, broken = custom_ops.build(), broken_packages()
    passed = all(check["passed"] for check in checks)
    return {
        "version": __version__,
        "machine": f"{platform.system()} {platform.machine()}, {cpus}, "
        f"Python {platform.python_version()}",
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "broken_packages": broken,
        "gpu": gpu,
        "fastdeploy": fastdeploy,
        "device": device,
        "kernels": kernels,
        "note": not_checked(device, gpu, interpreting),
        "checks": checks,
        "custom_ops": {"state": build.state, "reason": build.reason, "path": build.path},
        "graphs": graph_facts(device, interpreting),
        "healthy": passed and build.state != custom_ops.BROKEN and not broken,
    }


def _kernels(device: str) -> str:
    """Return the mode of Triton kernels here: compiled, interpreted, unavailable.

    Raises:
        BackendUnavailable: a device is checked, and Triton is missing or unsupported.
    """
    try:
        from fd_dsa.triton_runtime import INTERPRETING
    except BackendUnavailable:
        if device != "cpu":
            raise
        return "unavailable"
    return "interpreted" if INTERPRETING else "compiled"


def _gpu() -> dict[str, str] | None:
    if not has_nvidia_gpu():
        return None
    name, _, driver = "".join(nvidia_smi("name,driver_version", "0")).partition(", ")
    return {"name": name or "unknown (nvidia-smi does not answer)", "driver": driver or "unknown"}


def device_to_check(requested: str | None) -> str:
    """Return the device whose kernels are checked: the requested one, or Paddle's best.

    Raises:
        BackendUnavailable: a package is missing, or Paddle has no such device.
    """
    require_packages()
    from fd_dsa.device.allocation import paddle_device_counts

    counts = paddle_device_counts()
    devices = [f"{kind}:{number}" for kind, count in counts.items() for number in range(count)]
    if requested is None:
        return [*devices, "cpu"][0]
    if requested == "cpu" or requested in devices or f"{requested}:0" in devices:
        return requested
    raise BackendUnavailable(
        f"--device: got {shorten(requested)}, the installed Paddle has: "
        f"{', '.join(['cpu', *devices])}"
    )


def require_packages() -> None:
    """Import Paddle.

    Raises:
        BackendUnavailable: Paddle or another required package is missing or broken.
    """
    for package in _NEEDED:
        if find_spec(package) is None:
            cure = pip_command("numpy") if package == "numpy" else extra_command("cpu")
            raise BackendUnavailable(f"{package} is not installed; {cure}, then run this again")
    from fd_dsa.doctor.packages import import_errors

    try:
        prepare_cpu_runtime()
    except (FdDsaError, ImportError):
        raise
    except Exception as error:
        # Paddle imports NumPy
        package = "numpy" if "numpy" in import_errors(("numpy",)) else "paddle"
        reason = describe_error(error)
        raise BackendUnavailable(
            f"{package} cannot be imported ({reason}); install it again, then run this again"
        ) from error


def require_triton() -> None:
    """Import the Triton runtime, whose kernels determine the work memory of a plan.

    Raises:
        BackendUnavailable: Triton is missing or of an unsupported version.
    """
    try:
        import fd_dsa.triton_runtime  # noqa: F401
    except BackendUnavailable as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise BackendUnavailable(
            "--plan: triton is not installed, and the plan counts the work memory of its kernels; "
            f"run {triton_command()}, then run this again; a GPU is not needed"
        ) from error


def not_checked(device: str, gpu: dict[str, str] | None, interpreting: bool) -> str:
    """Describe the checks that could not be run, "" if all were."""
    if device != "cpu":
        where = "Triton kernels are interpreted in this process (TRITON_INTERPRET)."
        return f"No GPU kernel was run: {where}" if interpreting else ""
    if gpu is None:
        return "No GPU kernel was run: this machine has no NVIDIA GPU. Only the CPU was checked."
    return (
        "No GPU kernel was run: the GPU is there, but the device is the CPU (Paddle without CUDA, "
        "or --device cpu). With paddlepaddle-gpu installed, run this again."
    )


def graph_facts(device: str, interpreting: bool) -> dict[str, Any]:
    """Return the decode step sizes that the embedded engine captures by default.

    Returns:
        `sizes`, empty if `reason` says why graphs are not captured.
    """
    reason = ""
    if device == "cpu":
        reason = "a CPU has no graphs"
    elif interpreting:
        reason = "Triton kernels are interpreted in this process"
    else:
        from paddle.device.cuda.graphs import is_cuda_graph_supported

        if not is_cuda_graph_supported():
            reason = "this build of Paddle has no CUDA graphs"
    return {
        "sizes": [] if reason else list(EngineConfig().on_device("gpu:0").capture_sizes),
        "reason": reason,
    }


def as_text(found: dict[str, Any], with_tree: bool = False) -> str:
    """Return the report as text for the terminal."""
    # these modules import only required packages
    from fd_dsa.custom_ops import BROKEN
    from fd_dsa.doctor.checks import as_lines as checks_lines
    from fd_dsa.doctor.fastdeploy import as_lines as fastdeploy_lines
    from fd_dsa.doctor.packages import as_lines as broken_lines

    packages = ", ".join(f"{name} {v or 'not installed'}" for name, v in found["packages"].items())
    gpu, ops = found["gpu"], found["custom_ops"]
    state = "BROKEN" if ops["state"] == BROKEN else ops["state"]
    path = f" ({ops['path']})" if ops["path"] else ""
    sizes = ", ".join(map(str, found["graphs"]["sizes"]))
    graphs = f"decode steps of {sizes} rows, unless flags say otherwise"
    lines = [
        f"fd_dsa     {found['version']}",
        f"machine    {found['machine']}",
        f"packages   {packages}",
        *broken_lines(found["broken_packages"]),
        f"gpu        {gpu['name'] + ', driver ' + gpu['driver'] if gpu else 'none'}",
        *fastdeploy_lines(found["fastdeploy"], with_tree),
        f"custom ops {state}: {ops['reason']}{path}",
        f"device     {found['device']}; Triton kernels are {found['kernels']} in this process",
        f"graphs     {graphs if sizes else 'none: ' + found['graphs']['reason']}",
        "",
        *checks_lines(found["checks"]),
    ]
    if found["note"]:
        lines += ["", found["note"]]
    lines += [
        "",
        "healthy" if found["healthy"] else "NOT healthy: see what FAILED or is BROKEN above",
    ]
    if with_tree:
        serves = "serves" if found["fastdeploy"]["serves"] else "does NOT serve"
        lines.append(f"fd_dsa {serves} in FastDeploy: see the lines below its version")
    # a file, or a pipe without COLUMNS, has no width
    fold = textwrap.TextWrapper(
        shutil.get_terminal_size((_NO_WIDTH, 24)).columns,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    text, commands = "", (own_command(), python_command())
    for line in lines:
        fold.subsequent_indent = " " * max(4, len(line) - len(line.lstrip()) + 2)
        # a folded command could not be pasted
        has_command = any(command in line for command in commands)
        text += f"{line if has_command else fold.fill(line)}\n"
    return text
