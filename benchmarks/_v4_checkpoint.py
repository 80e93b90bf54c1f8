"""Random weights of DeepSeek-V4 in the names and formats of its release."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2
from typing import Any

from tests.v4_model.cases import deepseek_name
from tests.v4_model.quantised import FP8_WEIGHTS

# projections at the end of a block, and the power of two that scales them down
_ADDING, _LESS = ("wo_b", "w2"), 3
# exponent of a scale of 1, and by how much scales differ
_ONE, _SPREAD = 127, 3


def weights(config: dict[str, Any], device: str) -> Iterator[tuple[str, Any]]:
    """Yield names and random tensors of the checkpoint: FP8, FP4 experts, ids of hash routing.

    A layer adds little to its input: otherwise experts that rounding selects would make two right
    engines differ as much as a wrong one does.
    """
    import torch

    from fd_dsa.models.expected_tensors import expected_tensors
    from fd_dsa.models.registry import config_from_dict

    torch.manual_seed(0)
    for own_name, expected in expected_tensors(config_from_dict(config)).items():
        name, shape = deepseek_name(own_name), expected.shape
        part = name.split(".")[-2] if name.endswith(".weight") else ""
        if expected.ids_below:
            order = torch.rand((shape[0], expected.ids_below), device=device).argsort(dim=1)
            yield name, order[:, : shape[1]]
        elif part in FP8_WEIGHTS and "compressor" not in name:
            yield from _quantised(name, part, shape, device)
        else:
            yield name, _drawn(name, part, shape, device)


def _quantised(
    name: str, part: str, shape: tuple[int, ...], device: str
) -> Iterator[tuple[str, Any]]:
    """Yield a projection and its scales, powers of two."""
    import torch

    rows, columns = shape
    exponent = _ONE - round(0.5 * log2(columns)) - (_LESS if part in _ADDING else 0)
    if ".experts." in name:
        # the root of the mean square of uniform codes is nearly 3
        exponent -= 2
        yield name, torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, device=device)
        groups: tuple[int, int] = (rows, columns // 32)
    else:
        noise = torch.randn(shape, dtype=torch.bfloat16, device=device)
        yield name, noise.to(torch.float8_e4m3fn)
        groups = -(-rows // 128), -(-columns // 128)
    codes = torch.randint(exponent - _SPREAD + 1, exponent + 1, groups, device=device)
    scales = codes.to(torch.uint8).view(torch.float8_e8m0fnu)
    yield f"{name.removesuffix('.weight')}.scale", scales


def _drawn(name: str, part: str, shape: tuple[int, ...], device: str) -> Any:
    """Return a tensor that keeps activations near 1, bfloat16 or of a connection float32."""
    import torch

    noise = torch.randn(shape, device=device)
    if "norm" in name:
        noise = 1 + 0.1 * noise
    elif name.endswith("_scale"):
        noise = 1 + 0.3 * noise
    elif name.endswith(("_base", "sink", "ape")):
        noise = 0.5 * noise
    elif name.endswith("gate.bias"):
        noise = 0.1 * noise
    elif part != "embed":
        noise = noise * ((3.0 if part == "head" else 1.0) * shape[-1] ** -0.5)
    return noise.to(torch.bfloat16) if part and part != "fn" else noise
