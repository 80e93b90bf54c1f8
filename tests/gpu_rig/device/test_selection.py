"""A recording backend on a device: the oracles hold for what it wrote down there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.accuracy.selection.test_tap import CASES, FP8, check, recorded
from tests.gpu_rig import Rig

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
