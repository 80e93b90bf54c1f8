"""What the plug-in's tests share: the log as it was, and names of FastDeploy's."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """`register` makes our log visible where nobody has; not for other tests."""
    package = logging.getLogger("fd_dsa")
    level, handlers = package.level, list(package.handlers)
    yield
    package.setLevel(level)
    package.handlers[:] = handlers
