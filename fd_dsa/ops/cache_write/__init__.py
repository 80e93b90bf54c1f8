"""Write this step's keys into a paged cache."""

from __future__ import annotations

from typing import Any

from fd_dsa.ops._host import check_dtype, check_shape
from fd_dsa.ops.cache_write.paddle_impl import write_rows

__all__ = ["write_cache"]


def write_cache(cache: Any, parts: tuple[Any, ...], slot_mapping: Any) -> None:
    """Write each token's row, the parts side by side, at its slot; slots of -1 are skipped.

    Args:
        cache: [num_slots, width] float32, or int16 holding bfloat16 bits; a token's row.
        parts: float32 [num_tokens, width_i]; the widths add up to `width`. The latent cache takes
            (compressed_kv, k_pe), the indexer cache one part.
        slot_mapping: int64 [num_tokens], from the step's metadata.

    Raises:
        ShapeError, DtypeError: before anything is written.
    """
    check_dtype("write_cache", "cache", cache, ("float32", "int16"))
    check_dtype("write_cache", "slot_mapping", slot_mapping, ("int64",))
    num_tokens = slot_mapping.shape[0]
    width = 0
    for i, part in enumerate(parts):
        check_shape("write_cache", f"parts[{i}]", part, (num_tokens, None))
        check_dtype("write_cache", f"parts[{i}]", part, ("float32",))
        width += part.shape[1]
    check_shape("write_cache", "cache", cache, (None, width))
    write_rows(cache, parts, slot_mapping)
