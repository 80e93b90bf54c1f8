"""Selection of the experts that a device holds in four bits."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable

from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.dequantize import FP4, FP4_GROUP
from fd_dsa.models.expected_tensors import EXPERT, expected_tensors
from fd_dsa.models.four_bits import FourBits
from fd_dsa.models.registry import FamilyConfig

logger = logging.getLogger(__name__)
# groups for which there are kernels
_GROUPS: tuple[int, ...] = (128, 64, 32, 16)


def four_bit_experts(
    checkpoint: Checkpoint | None, config: FamilyConfig, num_ranks: int
) -> FourBits | None:
    """Return the experts that a device holds in four bits, None without any.

    A log line counts the other matrices in four bits, which become bfloat16.

    Args:
        checkpoint: None = random weights.
    """
    packing, expected = config.packing, expected_tensors(config)
    is_fp4 = isinstance(config, DeepseekV4Config) and config.expert_dtype == "fp4"
    if packing is None and not is_fp4:
        return None
    dtype = FP4 if packing is None else packing.dtype
    packed = {
        name
        for name, one in expected.items()
        if one.may_be_fp4 or one.may_be_packed
        if (EXPERT in name if checkpoint is None else checkpoint.info(name).dtype == dtype)
    }
    found = None
    if packing is None or not packing.has_groups:
        found = _layout(config, num_ranks, _whole_layers(packed, expected))
    if rest := len(packed) - (0 if found is None else len(found.names)):
        title = "FP4" if packing is None else packing.title
        cause = ", as columns in act-order have no groups" if packing and packing.has_groups else ""
        logger.info("%s: a device holds %d matrices dequantised%s", title, rest, cause)
    return found


def _whole_layers(packed: set[str], expected: Iterable[str]) -> frozenset[str]:
    """Return the packed experts of layers whose experts are all packed."""
    layers = defaultdict(list)
    for name in expected:
        if EXPERT in name:
            layers[name.partition(EXPERT)[0]].append(name)
    return frozenset(n for names in layers.values() if packed.issuperset(names) for n in names)


def _layout(config: FamilyConfig, num_ranks: int, names: frozenset[str]) -> FourBits | None:
    """Return the layout of matrices in four bits, None if no kernel has their groups."""
    packing, part = config.packing, expected_tensors(config)
    if num_ranks > 1:
        part = expected_tensors(config.split(num_ranks))
    kind, sizes = "int4", _GROUPS
    if packing is None:
        kind, sizes = "e8m0", (FP4_GROUP,)
    elif packing.dtype == "U8":
        kind, sizes = "e4m3", (16,)
    elif packing.group_size:
        # scales of a larger group are repeated
        sizes = tuple(n for n in _GROUPS if packing.group_size % n == 0)
    widths = {part[name].shape[1] for name in names}
    group = next((n for n in sizes if not any(width % n for width in widths)), None)
    return FourBits(names, kind, group) if names and group is not None else None
