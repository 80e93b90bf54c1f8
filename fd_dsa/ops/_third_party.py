"""Packages of other projects that may serve an operator: found, imported once, told once.

FlashMLA and DeepGEMM import torch. Beside Paddle that name has to mean Paddle inside them, and
nowhere else: Paddle's compatibility scope does that for modules imported after it was set.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fd_dsa.errors import BackendUnavailable

logger = logging.getLogger(__name__)

# class of the finder that Paddle puts on sys.meta_path
_FINDER = "TorchProxyMetaFinder"


@dataclass(frozen=True, slots=True)
class ThirdParty:
    """Whether a package serves an operator on a kind of device, and why or why not."""

    operator: str
    kind: str
    package: str
    serves: bool
    reason: str


_settled: dict[tuple[str, str], ThirdParty] = {}
_told: set[ThirdParty] = set()


def third_party_table() -> list[ThirdParty]:
    """What was settled last for each operator and kind of device, in order."""
    return [_settled[key] for key in sorted(_settled)]


def settle(
    operator: str,
    kind: str,
    package: str,
    reason: str,
    *,
    serves: bool = False,
    failed: bool = False,
) -> None:
    """Remember whether `package` serves `operator`, and log it; the same finding is logged once.

    Args:
        kind: of device, as `device_kind` names it.
        reason: why, or why not.
        failed: it was tried, in vain, which is a warning.
    """
    found = ThirdParty(operator, kind, package, serves, reason)
    _settled[operator, kind] = found
    if found in _told:
        return
    _told.add(found)
    what = "serves" if serves else f"{'failed' if failed else 'is left out'}, our kernel serves"
    level = logging.WARNING if failed else logging.INFO
    logger.log(level, "%s on %s: %s %s (%s)", operator, kind, package, what, reason)


def is_installed(package: str) -> bool:
    """Whether a package could be imported; nothing is."""
    if package in sys.modules:
        return sys.modules[package] is not None
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def load(package: str, tensor: Any) -> Any:
    """Import a package that computes on the tensors of `tensor`'s library.

    Beside Paddle its `import torch` gives Paddle. The scope for that is set at most once, before
    the first import, and never where Paddle poses as torch for the whole process already: a
    scope would end that.

    Raises:
        BackendUnavailable: Paddle is too old to have such a scope.
        Exception: whatever the package raises when it is imported.
    """
    if package not in sys.modules and type(tensor).__module__.partition(".")[0] == "paddle":
        _see_paddle_as_torch(package)
    return import_module(package)


def _see_paddle_as_torch(package: str) -> None:
    """Let `package` find Paddle under the name of torch."""
    import paddle

    present = next((f for f in sys.meta_path if type(f).__name__ == _FINDER), None)
    if present is not None:
        # a finder without these is of a release that we do not know: it is left as it is
        scope = getattr(present, "_local_enabled_scope", {package})
        if getattr(present, "_globally_enabled", True) or package in scope:
            return
    # the second name is that of releases before the first was public
    enable = getattr(paddle, "enable_compat", None) or getattr(
        paddle.compat, "enable_torch_proxy", None
    )
    if enable is None:
        raise BackendUnavailable(
            f"{package}: Paddle {paddle.__version__} cannot pose as torch for one package; "
            "3.3 and later can"
        )
    enable(scope={package}, silent=True)
    if present is not None:
        # each call adds the finder once more, and who set it first would have to remove it twice
        sys.meta_path.remove(present)
