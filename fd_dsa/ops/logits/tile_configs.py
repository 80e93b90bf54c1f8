"""Configurations of the tile kernel: tokens of a tile, warps, pages in flight."""

from __future__ import annotations

from dataclasses import dataclass

from fd_dsa.cache_formats import INDEX_WIDTH
from fd_dsa.ops.fixed_order import fixed_order

PAGE = 64
"""Number of keys of a page, and of rows of a GEMM."""
BLOCK_SIZES = PAGE, PAGE // 2
"""Numbers of keys of a block of the cache that are supported."""
MAX_HEADS = 128
# columns of a GEMM on tensor cores: the minimum, and the number that uses them well
_MIN_COLUMNS, _COLUMNS = 16, 128
_STAGES = 3
# of a multiprocessor of Hopper: bytes of shared memory, and registers by thread of four warps
_SHARED, _REGISTERS, _MAX_REGISTERS = 228 << 10, 512, 255
# shared memory of a block for the system and for sums
_OTHER_BYTES = 2 << 10


@dataclass(frozen=True)
class TileConfig:
    """Configuration of the tile kernel.

    Attributes:
        first_tokens: number of tokens of a tile that the first GEMM scores; a power of two.
        rest_tokens: maximum number of further tokens, which a second GEMM with the same keys
            scores; 0 or a power of two.
        num_warps, num_stages, maxnreg: options of a Triton launch. A stage is a page in shared
            memory. All but one are in flight.
        programs_per_processor: number of blocks that a multiprocessor holds at a time.
        begin_pages: cost of the start of a tile, as a number of scored pages. At the start queries
            are loaded while no page is in flight.
    """

    first_tokens: int
    rest_tokens: int = 0
    num_warps: int = 4
    num_stages: int = _STAGES
    maxnreg: int | None = None
    programs_per_processor: int = 4
    begin_pages: int = 2

    @property
    def tile_tokens(self) -> int:
        """Maximum number of tokens of a tile."""
        return self.first_tokens + self.rest_tokens


def unsupported_reason(
    cache_dtype: str, q_dtype: str, block_size: int, num_heads: int, width: int
) -> str | None:
    """Return why the tile kernel does not support these sizes, None if it does.

    Args:
        cache_dtype: "float32", "bfloat16", "int16" or "fp8_ds_mla".
        q_dtype: dtype of the queries, of any name for "fp8_ds_mla".
        width: values of a key.
    """
    if cache_dtype not in ("fp8_ds_mla", "bfloat16"):
        return f"the cache is {cache_dtype}, it reads fp8_ds_mla and bfloat16"
    if cache_dtype == "bfloat16" and q_dtype != cache_dtype:
        return f"queries of {q_dtype}, a bfloat16 cache needs bfloat16"
    if block_size not in BLOCK_SIZES:
        return f"blocks of {block_size} keys, it reads {' and '.join(map(str, BLOCK_SIZES))}"
    if num_heads > MAX_HEADS:
        return f"{num_heads} index heads, it takes at most {MAX_HEADS}"
    if width != INDEX_WIDTH:
        return f"keys of {width} values, it reads {INDEX_WIDTH}"
    return None


def padded_heads(num_heads: int) -> int:
    """Return the number of columns of a token: a power of two, at least the minimum of a GEMM."""
    return max(_MIN_COLUMNS, _power(num_heads))


def decode_config(num_heads: int, tokens_per_row: int, *, is_fp8: bool = True) -> TileConfig:
    """Return the configuration for steps with only decode rows.

    Args:
        num_heads: number of index heads.
        tokens_per_row: usual number of tokens of a row, with drafts. The keys of a row are read
            once for that many tokens, up to two GEMMs. Other numbers of tokens work too.
        is_fp8: True for fp8_ds_mla, False for bfloat16.
    """
    widest = _widest(num_heads)
    if fixed_order():
        # the place of a token in a tile, and the number of its tokens, may change the order of sums
        tokens_per_row = 1
    first = min(_power(tokens_per_row), widest)
    rest = min(_power(tokens_per_row - first), widest)
    return _placed(num_heads, first, rest, is_fp8=is_fp8)


def prompt_config(num_heads: int, *, is_fp8: bool = True) -> TileConfig:
    """Return the configuration for steps with prompts: as many GEMMs a page as registers allow."""
    if fixed_order():
        return decode_config(num_heads, 1, is_fp8=is_fp8)
    widest = _widest(num_heads)
    return _placed(num_heads, widest, widest, is_fp8=is_fp8)


def _placed(num_heads: int, first: int, rest: int, *, is_fp8: bool) -> TileConfig:
    """Return the configuration with the maximum number of blocks that share a multiprocessor."""
    columns = padded_heads(num_heads)
    many_sums = first * columns == _COLUMNS and columns == _MIN_COLUMNS
    if many_sums:
        # their sums leave too few registers for a second GEMM
        rest = 0
    # queries and pages are in shared memory
    vectors = (first + rest) * columns + _STAGES * PAGE
    shared = vectors * INDEX_WIDTH * (1 if is_fp8 else 2) + _OTHER_BYTES
    programs = min(3 if rest or many_sums else 4, _SHARED // shared)
    registers = min(_REGISTERS // programs // 8 * 8, _MAX_REGISTERS)
    return TileConfig(first, rest, maxnreg=registers, programs_per_processor=programs)


def _widest(num_heads: int) -> int:
    """Return the number of tokens of a GEMM with the best number of columns."""
    return max(1, _COLUMNS // padded_heads(num_heads))


def _power(number: int) -> int:
    """Return the next power of two, 0 for 0 and less."""
    return 1 << (number - 1).bit_length() if number > 0 else 0
