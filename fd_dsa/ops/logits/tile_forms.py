"""In which form the tile kernel is compiled: tokens of a tile, warps, pages in flight."""

from __future__ import annotations

from dataclasses import dataclass

from fd_dsa.ops.fixed_order import fixed_order

BLOCK_SIZE = 64
"""Keys of a page, and rows of a GEMM; other caches are not read."""
MAX_HEADS = 128
# columns of a GEMM on tensor cores: the least, and the number that uses them well
_LEAST_COLUMNS, _COLUMNS = 16, 128


@dataclass(frozen=True)
class TileForm:
    """A form of the tile kernel.

    Attributes:
        first_tokens: tokens of a tile that the first GEMM scores; a power of two.
        rest_tokens: most tokens after them, which a second GEMM with the same keys scores; 0, or a
            power of two.
        num_warps, num_stages, maxnreg: as of a Triton launch. A stage is a page in shared memory,
            all but one are in flight.
        programs_per_processor: blocks that a multiprocessor holds at a time.
        begin_pages: how many pages a program scores in the time in which it begins a tile: queries
            are read, and no page is in flight.
    """

    first_tokens: int
    rest_tokens: int = 0
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    programs_per_processor: int = 4
    begin_pages: int = 2

    @property
    def tile_tokens(self) -> int:
        """Most tokens of a tile."""
        return self.first_tokens + self.rest_tokens


def why_not(cache_dtype: str, block_size: int, num_heads: int) -> str | None:
    """Why the tile kernel cannot score; None if it can.

    Args:
        cache_dtype: "float32", "bfloat16" or "fp8_ds_mla".
    """
    if cache_dtype != "fp8_ds_mla":
        return f"the cache is {cache_dtype}, it reads fp8_ds_mla"
    if block_size != BLOCK_SIZE:
        return f"blocks of {block_size} keys, it reads {BLOCK_SIZE}"
    if num_heads > MAX_HEADS:
        return f"{num_heads} index heads, it takes at most {MAX_HEADS}"
    return None


def padded_heads(num_heads: int) -> int:
    """Columns of a token: a power of two, at least those that a GEMM must have."""
    return max(_LEAST_COLUMNS, _power(num_heads))


def decode_form(num_heads: int, tokens_per_row: int) -> TileForm:
    """The form for steps of decode rows alone.

    Args:
        num_heads: index heads.
        tokens_per_row: tokens that most rows have, drafts included: the keys of a row are read once
            for as many, up to two products. Rows of other numbers are scored as well.
    """
    widest = _widest(num_heads)
    if fixed_order():
        # which token of a tile it is, and of how many, may change the order of its sum
        tokens_per_row = 1
    first = min(_power(tokens_per_row), widest)
    return _placed(num_heads, first, min(_power(tokens_per_row - first), widest))


def prompt_form(num_heads: int) -> TileForm:
    """The form for steps with prompts: as many products to a page as there are registers for."""
    if fixed_order():
        return decode_form(num_heads, 1)
    widest = _widest(num_heads)
    return _placed(num_heads, widest, widest)


def _placed(num_heads: int, first: int, rest: int) -> TileForm:
    """The form of these tokens, so that as many blocks as can be share 65,536 registers."""
    columns = padded_heads(num_heads)
    many_sums = first * columns == _COLUMNS and columns == _LEAST_COLUMNS
    if many_sums:
        # they leave no registers for a second GEMM
        rest = 0
    if rest or many_sums:
        return TileForm(first, rest, maxnreg=168, programs_per_processor=3)
    return TileForm(first, maxnreg=128)


def _widest(num_heads: int) -> int:
    """Tokens of a GEMM with the best number of columns."""
    return max(1, _COLUMNS // padded_heads(num_heads))


def _power(number: int) -> int:
    """The next power of two; 0 of 0 and less."""
    return 1 << (number - 1).bit_length() if number > 0 else 0
