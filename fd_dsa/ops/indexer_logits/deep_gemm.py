"""Indexer scores by DeepGEMM, in the place of our kernel, behind one form for all releases.

Two of its kernels: one reads keys from the pages, a row of the block table for each token; the
other reads gathered keys, and shares a tile of them between the tokens of a prompt.
"""

from __future__ import annotations

import sys
from typing import Any

PACKAGE = "deep_gemm"
_HEADS = (32, 64)
_BLOCK_SIZE = 64
SCORE_TILE = 256
"""Keys that a block of its kernels scores; a row of scores is a multiple of it."""
_TABLE_BYTES = 256 << 20


def reason_against(config: Any) -> str | None:
    """Why DeepGEMM cannot serve a DSABackendConfig; None if it can."""
    if not config.cache_layout.is_fp8:
        return f"the cache is {config.cache_layout.kv_cache_dtype}, it reads fp8_ds_mla"
    if config.index_n_heads not in _HEADS:
        return f"{config.index_n_heads} index heads, it takes 32 or 64"
    table_bytes = 4 * config.max_num_tokens * config.max_blocks_per_seq
    if table_bytes > _TABLE_BYTES:
        return f"a block table for every token takes {table_bytes} bytes, limit {_TABLE_BYTES}"
    return None


def as_e4m3(codes: Any) -> Any:
    """A uint8 tensor of e4m3 codes as a float8_e4m3fn one on the same memory."""
    library = sys.modules[type(codes).__module__.partition(".")[0]]
    return codes.view(library.float8_e4m3fn)


class DeepGemm:
    """The two kernels of DeepGEMM that score keys, whatever the release.

    Args:
        module: the package.

    Attributes:
        num_parts: processors that a schedule shares the work out to; it has one row more.
        reads_gathered: whether the release gives scores relative to a token's first key, which
            keeps a row as short as the longest request.
    """

    def __init__(self, module: Any) -> None:
        self._schedule = module.get_paged_mqa_logits_metadata
        self._paged, self._paged_takes_pair = _either(module, "paged_mqa_logits")
        self._ragged, self._ragged_takes_pair = _either(module, "mqa_logits")
        self.num_parts = int(module.get_num_sms())
        self.reads_gathered = True
        # releases of 2025 took lengths [rows], newer ones [rows, tokens of a row]
        self._lengths_shape: list[int] = [-1, 1]

    def find_form(self, lengths: Any) -> None:
        """Learn which form of lengths this release takes.

        Args:
            lengths: int32 [rows].

        Raises:
            Exception: it takes neither; what the package raised.
        """
        try:
            self.schedule(lengths)
        except Exception:
            self._lengths_shape = [-1]
            self.schedule(lengths)

    def schedule(self, lengths: Any) -> Any:
        """int32 [num_parts + 1, 2]: how rows of int32 [rows] keys are shared out."""
        return self._schedule(lengths.reshape(self._lengths_shape), _BLOCK_SIZE, self.num_parts)

    def score_pages(
        self, q: Any, cache: Any, weights: Any, lengths: Any, tables: Any, schedule: Any, width: int
    ) -> Any:
        """Scores of each token against the keys in its own pages.

        Args:
            q: float8_e4m3fn [rows, index_n_heads, 128].
            cache: uint8 [num_blocks, 64, 132], the layer's indexer cache.
            weights: float32 [rows, index_n_heads].
            lengths: int32 [rows]; keys that the token sees, 1 to `width`.
            tables: int32 [rows, max_blocks]; its pages.
            schedule: of these lengths.
            width: columns, a multiple of SCORE_TILE.

        Returns:
            float32 [rows, width] with any distance between rows; columns from a token's length on
            are undefined.
        """
        rows, heads, dim = q.shape
        q = q.reshape([rows, 1, heads, dim])
        num_blocks, block_size, record = cache.shape
        return self._paged(
            (q, None) if self._paged_takes_pair else q,
            cache.reshape([num_blocks, block_size, 1, record]),
            weights,
            lengths.reshape(self._lengths_shape),
            tables,
            schedule,
            width,
            clean_logits=False,
        )

    def score_gathered(
        self, q: Any, keys: Any, scales: Any, weights: Any, starts: Any, ends: Any, width: int
    ) -> Any:
        """Scores of each token against its window of gathered keys; column 0 = its first key.

        Args:
            q, weights: as in `score_pages`.
            keys, scales: float8_e4m3fn [num_keys, 128] and float32 [num_keys].
            starts, ends: int32 [rows]; the windows, at most `width` keys.
            width: columns.

        Returns:
            As in `score_pages`.
        """
        return self._ragged(
            (q, None) if self._ragged_takes_pair else q,
            (keys, scales),
            weights,
            starts,
            ends,
            clean_logits=False,
            max_seqlen_k=width,
        )


def _either(module: Any, name: str) -> tuple[Any, bool]:
    """The function of FP8 alone, or the one whose query is a pair of values and FP4 scales."""
    plain = getattr(module, f"fp8_{name}", None)
    return (getattr(module, f"fp8_fp4_{name}"), True) if plain is None else (plain, False)
