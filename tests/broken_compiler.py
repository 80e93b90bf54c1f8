"""A compiler that refuses some kernels, whether they are compiled or interpreted."""

from __future__ import annotations

from typing import Any

import pytest

from fd_dsa.ops import providers
from fd_dsa.triton_runtime import Kernel


class PTXASError(Exception):
    """What Triton's compiler raises where its assembler fails; no error of ours."""


def refuse_to_compile(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel) -> list[str]:
    """Let no form of these kernels be made until the test ends, and forget those that were.

    Returns:
        names of the kernels whose forms were asked for, one for each time.
    """
    asked: list[str] = []
    made = Kernel._new_variant

    def new_variant(self: Kernel, *which: Any) -> Any:
        if self in kernels:
            asked.append(self.__name__)
            raise PTXASError("ptxas died")
        return made(self, *which)

    monkeypatch.setattr(Kernel, "_new_variant", new_variant)
    for kernel in kernels:
        fresh = {"_variants": {}, "_chains": {}, "_chained": set(), "_launch": kernel.run}
        for name, value in fresh.items():
            monkeypatch.setattr(kernel, name, value)
    monkeypatch.setattr(providers, "_refused", {})
    monkeypatch.setattr(providers, "_choices", {})
    return asked
