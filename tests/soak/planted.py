"""Defects planted in the engine, which random histories must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest


def check_it_is_found(
    run_histories: Callable[[int, int], Counter[str]],
    owner: type,
    name: str,
    defect: Callable[..., Any],
    first: int = 0,
) -> None:
    """Check that one of 200 histories fails with a defect.

    Args:
        run_histories: runs the histories from a first number on.
        owner: class of the method that gets the defect.
        name: name of the method.
        defect: method that takes its place.
        first: number of the first history. One shortly before the history that fails saves time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, defect)
        with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
            run_histories(first, 200)
