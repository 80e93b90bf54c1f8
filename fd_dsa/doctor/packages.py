"""Packages that the server needs and that cannot be imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

from fd_dsa.commands import core_command, extra_command
from fd_dsa.errors import describe_error

REQUIRED = (
    *("fastapi", "h11", "httpx", "huggingface_hub", "jinja2", "numpy", "orjson"),
    *("prometheus_client", "psutil", "pydantic", "yaml", "rich", "safetensors", "shtab"),
    *("tokenizers", "typing_extensions", "uvicorn"),
)
"""Modules of the packages of every installation."""
# a module without which the server lacks a feature, and its extra
_OPTIONAL, _EXTRA = "llguidance", "structured"


def broken_packages() -> dict[str, str]:
    """Return the error of each module that cannot be imported. An optional one may be missing."""
    return import_errors([*REQUIRED, *([_OPTIONAL] if find_spec(_OPTIONAL) is not None else [])])


def import_errors(names: Iterable[str]) -> dict[str, str]:
    """Return the error of each of the modules that cannot be imported."""
    found = {}
    for name in names:
        try:
            import_module(name)
        # a package that does not fit another one may raise anything
        except Exception as error:
            found[name] = describe_error(error)
    return found


def as_lines(broken: dict[str, str]) -> list[str]:
    """Return the lines of the report, none if all packages can be imported."""
    lines = [f"BROKEN     {name}: {error}" for name, error in broken.items()]
    reinstall = "--force-reinstall"
    commands = [core_command(reinstall)] if broken.keys() - {_OPTIONAL} else []
    commands += [extra_command(_EXTRA, reinstall)] if _OPTIONAL in broken else []
    return [*lines, *(f"           install it again by {command}" for command in commands)]
