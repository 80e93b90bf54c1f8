"""Shell commands in messages, in a form that users can paste into the same shell."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_EXTRA = re.compile(r"""extra == ["']([^"']*)""")


def own_command(*words: str) -> str:
    """Return a shell line that calls `fd-dsa` of this Python with these words."""
    script = Path(sys.executable).with_name("fd-dsa")
    if script.exists():
        return shlex.join([_program(script), *words])
    # a source folder on PYTHONPATH has no script
    return python_command("-m", "fd_dsa", *words)


def python_command(*words: str) -> str:
    """Return a shell line that calls this Python with these words."""
    return shlex.join([_program(Path(sys.executable)), *words])


def pip_command(*requirements: str) -> str:
    """Return a shell line that installs packages or project folders into this Python."""
    return python_command("-m", "pip", "install", *requirements)


def triton_command() -> str:
    """Return a shell line that installs a supported Triton into this Python."""
    return pip_command("triton>=3.3,<3.10")


def extra_command(extra: str, *flags: str) -> str:
    """Return a shell line that installs the packages of an extra into this Python.

    The line names these packages, because fd_dsa is not on a package index.
    """
    return pip_command(*flags, *(_packages_of(extra) or [f"{_ROOT}[{extra}]"]))


def core_command(*flags: str) -> str:
    """Return a shell line that installs the packages that fd_dsa needs in every installation."""
    is_source = Path(project_folder("pyproject.toml")).is_file()
    needed = [] if is_source else _packages_of(None)
    return pip_command(*flags, *(needed or [project_folder()]))


def project_folder(name: str = ".") -> str:
    """Return a project folder's path, relative if it is below the current folder."""
    return _relative(_ROOT / name)


def _packages_of(extra: str | None) -> list[str]:
    """Return the requirements of an extra, or of every installation. Empty without metadata."""
    found: list[str] = []
    with suppress(PackageNotFoundError):
        for requirement in requires("fd_dsa") or ():
            package, _, marker = requirement.partition(";")
            named = _EXTRA.search(marker)
            if (named and named[1]) == extra:
                found.append(package.strip() if extra else requirement)
    return found


def _program(path: Path) -> str:
    """Return the shortest name by which a shell in the current folder finds a program."""
    if shutil.which(path.name) == str(path):
        return path.name
    return _relative(path)


def _relative(path: Path) -> str:
    try:
        below = path.relative_to(Path.cwd())
    except (OSError, ValueError):
        # outside the current folder, or the current folder was deleted
        return str(path)
    # a bare name would be searched on PATH, or on a package index
    return str(below) if len(below.parts) != 1 else f"./{below}"
