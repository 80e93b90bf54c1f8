"""Records and losses of a device: the oracles hold, and the CPU agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.accuracy.embedded import SingleSequenceRunner
from tests.accuracy.losses import token_losses
from tests.accuracy.selection.test_topk_hook import (
    CASES,
    FP8,
    TOKENS,
    check,
    recorded,
    runner_for,
)
from tests.gpu_rig import Rig
from tests.runner.tiny import V32, tiny_model

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]


@pytest.mark.parametrize(("fields", "kv_cache_dtype"), CASES)
def test_what_is_recorded_is_what_the_layers_did(
    rig: Rig, fields: dict[str, Any], kv_cache_dtype: str
) -> None:
    num_tokens = 40
    if not rig.is_real:
        if fields is not FP8:
            pytest.skip("kernels are interpreted here: one format is enough")
        # past the selection by one token
        fields, num_tokens = fields | {"num_hidden_layers": 1}, 13
    device = f"{rig.place.get_device_type()}:0"
    sequence, backend, _ = recorded(fields, kv_cache_dtype, device, num_tokens)
    check(sequence, backend)


def test_losses_are_those_of_the_cpu(rig: Rig) -> None:
    tokens = TOKENS[: 40 if rig.is_real else 5]
    fields = V32 | ({} if rig.is_real else {"num_hidden_layers": 1})
    found = []
    for device in ("cpu", f"{rig.place.get_device_type()}:0"):
        model = tiny_model(fields, device=device)
        sequence = SingleSequenceRunner(runner_for(model, "float32", device))
        found.append(token_losses(sequence, tokens))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-3)
