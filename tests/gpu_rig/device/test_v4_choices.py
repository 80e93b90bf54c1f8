"""Choices of experts and entries that rounding changes, and what they do to the logits.

A model with close scores chooses other experts and entries in bfloat16. With the choices of float32
forced on it, its logits are as near as those of a model without close scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.models.deepseek_v4 import device_moe
from fd_dsa.ops.expert_pairs import Choice
from fd_dsa.v4_attention.device_backend import V4DeviceBackend
from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_v4_model import (
    FEW_ITERATIONS,
    device_model,
    device_runner,
    worst,
)
from tests.v4_model.cases import CASES
from tests.v4_model.ours import prompt_logits

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.slow]

# bfloat16 against float32 with the same choices, as a share of the largest logit
BOUND = 0.03


class Choices:
    """Experts and entries of all tokens, in the order of the layers' calls.

    Attributes:
        made: int32 arrays, one for each call.
        changed: whether each token of each call had another choice than the one forced on it.
    """

    def __init__(self) -> None:
        self.made: list[np.ndarray] = []
        self.changed: list[np.ndarray] = []

    @contextmanager
    def watched(self, forced: list[np.ndarray] | None = None) -> Iterator[None]:
        """Collect the choices made inside, or force those of another run, for each call one."""
        experts, entries = device_moe.choose_experts, V4DeviceBackend.select_entries
        left = iter(forced or ())

        def seen(chosen: Any) -> np.ndarray:
            self.made.append(np.sort(chosen.numpy(), axis=1))
            wanted = self.made[-1] if forced is None else next(left)
            self.changed.append((self.made[-1] != wanted).any(axis=1))
            return wanted

        def choose(logits: Any, *given: Any, **options: Any) -> Choice:
            ids, weights, _ = experts(logits, *given, **options)
            wanted = seen(ids)
            if forced is not None:
                scores = np.sqrt(np.logaddexp(0, logits.numpy().astype(np.float64)))
                own = np.take_along_axis(scores, wanted, axis=1)
                share = options["scaling"] * own / own.sum(axis=1, keepdims=True)
                put(ids, wanted)
                put(weights, share.astype(np.float32))
            return Choice(ids, weights)

        def select(backend: Any, *given: Any) -> Any:
            slots = entries(backend, *given)
            wanted = seen(slots)
            if forced is not None:
                # unused entries come first in ascending order, and last in a selection
                order = np.argsort(wanted < 0, axis=1, kind="stable")
                put(slots, np.take_along_axis(wanted, order, axis=1))
            return slots

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device_moe, "choose_experts", choose)
            patch.setattr(V4DeviceBackend, "select_entries", select)
            yield


def put(tensor: Any, values: np.ndarray) -> None:
    """Replace the values of a tensor on the device."""
    tensor.copy_(paddle.to_tensor(np.ascontiguousarray(values), place=tensor.place), False)


def test_close_choices_explain_the_logits_of_bfloat16(rig: Rig, tmp_path: Path) -> None:
    case = replace(CASES["mixed"], changes=FEW_ITERATIONS)
    folder, prompts = case.write(tmp_path), [case.prompt(n) for n in (30, 40)]

    def run(dtype: str, forced: list[np.ndarray] | None = None) -> tuple[list[np.ndarray], Choices]:
        runner, choices = device_runner(models[dtype], rig, dtype, case.block_size), Choices()
        with choices.watched(forced):
            return prompt_logits(runner, prompts, 24), choices

    models = {dtype: device_model(folder, rig, dtype) for dtype in ("float32", "bfloat16")}
    wanted, exact = run("float32")
    forced, own = run("bfloat16", exact.made)
    free, _ = run("bfloat16")
    assert any(changed.any() for changed in own.changed)
    assert worst(free, wanted) > 2 * BOUND
    assert worst(forced, wanted) < BOUND
