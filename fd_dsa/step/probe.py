"""Whether the kernel of custom_ops/ serves steps: it must agree with the host's on small ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.step.checks import StepLimits
from fd_dsa.step.counts import GivenCounts
from fd_dsa.step.device import Allocate, DeviceProvider
from fd_dsa.step.forward_meta import ForwardMeta
from fd_dsa.step.host import HostProvider
from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.transfers import on_host

_OPERATOR = "step_metadata"
_LIMITS = StepLimits(6, 40, 4, 8, 24)
# encoder, decoder and new lengths of the rows: with prompts, then drafts alone, then nothing
_STEPS = (
    ([9, 0, 0, 5, 0], [7, 24, 0, 0, 3], [9, 2, 0, 5, 1]),
    ([0, 0, 0, 0, 0], [7, 0, 3, 30, 0], [2, 0, 1, 2, 1]),
    ([0, 0], [5, 0], [0, 0]),
)
_FIELDS = tuple(name for name in ForwardMeta.__slots__ if not name.startswith(("num_", "max_")))


def kernels_that_serve(allocate: Allocate) -> Any:
    """The library whose kernel serves steps in the memory of `allocate`; None = Triton's.

    Asked anew in every process, once. Waits for the device.

    Raises:
        ConfigError, BackendUnavailable: see `custom_ops.choose`.
    """
    # interpreted kernels work in host memory, where a compiled one for a GPU would fault
    if INTERPRETING:
        return None
    return custom_ops.choose(_OPERATOR, lambda kernels: _difference(kernels, allocate))


def _difference(kernels: Any, allocate: Allocate) -> str:
    """Which array of which step differs from the host's; "" for none."""
    device = DeviceProvider(_LIMITS, allocate, True, kernels)
    host = HostProvider(_LIMITS, lambda array: array, True)
    tables = np.random.default_rng(0).permutation(24).astype(np.int32).reshape(6, 4)
    for number, lengths in enumerate(_STEPS):
        arrays = tuple(np.array(values, np.int32) for values in lengths)
        inputs = (*arrays, tables[: len(arrays[0])])
        given = GivenCounts(num_padded_tokens=40)
        found, wanted = device.build(inputs, given), host.build(inputs, given)
        for name in _FIELDS:
            expected = getattr(wanted, name)
            if expected is not None and not np.array_equal(
                on_host(getattr(found, name), expected), expected
            ):
                return f"{name} of probe {number} differs from the definition"
    return ""
