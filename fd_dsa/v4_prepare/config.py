"""Sizes of a DeepSeek-V4 decode step, and the shapes of everything that is built from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import index
from typing import Any, Literal, SupportsIndex

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.model_fields import ModelSource, read_model_fields

INT32_MAX = 2**31 - 1
# above this many bytes `hca_idx` is not written: its reader takes rows from the block table
HCA_LIST_BYTES_LIMIT = 64 * 2**20

_MAY_BE_ZERO = ("spec_tokens", "comp_base")


@dataclass(frozen=True)
class V4PrepareConfig:
    """Sizes which every step of one builder keeps to; the letters are those of error texts.

    Args:
        window_size: W, keys of the sliding window, the token's own included.
        spec_tokens: k, most draft tokens of a decode row. A row of 1..k+1 tokens is a decode row,
            a longer one a prefill row.
        block_size: P, tokens per block of the block table; a multiple of both ratios.
        csa_ratio: r1, tokens per entry of a CSA layer (its entries pool 2 * r1 tokens).
        hca_ratio: r2, tokens per entry of an HCA layer (its entries pool r2 tokens).
        index_topk: topk, most CSA entries that the indexer picks for a token.
        num_slots: S, owners of window rings and compressor states.
        num_blocks: NB, physical blocks.
        max_blocks_per_seq: MB, columns of the block table; holds max_model_len tokens.
        max_num_seqs: Bcap, rows of the buffers.
        max_num_tokens: Tcap, tokens of the buffers.
        max_tokens_per_seq: Qcap, most tokens of one row in a step.
        max_model_len: Lmax, most tokens of one row at all.
        swa: where window keys are: "ring" (W + k rows a slot) or "paged" (the blocks).
        comp_base: first row of compressed entries in a pool that holds them after the window
            keys; None = after all rings or blocks, 0 = pools of their own.
        hca_mode: "list" writes `hca_idx`, "table" leaves its rows to the reader; None = "list"
            unless the list would exceed 64 MiB.

    Raises:
        ValueError: names the field, its value, the rule and the cure.
        V4PrepareError: E_INDPTR, offsets of the lists could exceed int32.

    Source: ROCm/ATOM #728 (the idea), #817 and #894 (rows of the rings), vLLM #57122.
    """

    window_size: int
    spec_tokens: int
    block_size: int
    csa_ratio: int
    hca_ratio: int
    index_topk: int
    num_slots: int
    num_blocks: int
    max_blocks_per_seq: int
    max_num_seqs: int
    max_num_tokens: int
    max_tokens_per_seq: int
    max_model_len: int
    swa: Literal["ring", "paged"] = "ring"
    comp_base: int = None  # type: ignore[assignment]  # an int once constructed
    hca_mode: Literal["list", "table"] = None  # type: ignore[assignment]  # likewise

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name not in ("swa", "hca_mode") and not (name == "comp_base" and value is None):
                self._set(name, _size(name, value))
        _check_choice("swa", self.swa, ("ring", "paged"))
        _check_choice("hca_mode", self.hca_mode, ("list", "table", None))
        self._check_blocks()
        if self.comp_base is None:
            self._set("comp_base", self._num_window_rows)
        self._check_int32()
        self._choose_hca_mode()

    @classmethod
    def from_model(
        cls,
        hf_config: ModelSource,
        *,
        max_rows: int,
        max_model_len: int,
        num_slots: int,
        num_blocks: int,
        spec_tokens: int = 0,
        max_num_tokens: int | None = None,
        max_tokens_per_seq: int | None = None,
        max_blocks_per_seq: int | None = None,
        block_size: int = 128,
        swa: Literal["ring", "paged"] = "ring",
        comp_base: int | None = None,
        hca_mode: Literal["list", "table"] | None = None,
    ) -> V4PrepareConfig:
        """The sizes for a DeepSeek-V4 model: window, ratios and top-k come from its config.

        Args:
            hf_config: an object with the model's fields as attributes, a mapping of them, or the
                path of a config.json or of the folder that holds it. Read are `sliding_window`,
                `index_topk`; the layers, as transformers writes them (`layer_types`, with
                `compress_rates` by type) or as released checkpoints do (`compress_ratios`: one
                ratio a layer, 0 = window only; the lower other one is CSA's, the higher HCA's);
                and, where they are there, `max_position_embeddings` and `num_hidden_layers`.
                Entries past `num_hidden_layers` belong to draft layers and do not count.
            max_rows: rows of the buffers (`max_num_seqs`).
            max_num_tokens: None = max_rows * (spec_tokens + 1), a decode step.
            max_tokens_per_seq: None = spec_tokens + 1, or max_num_tokens where that is given.
            max_blocks_per_seq: None = as many as max_model_len needs.

        Raises:
            ConfigError: a field of the model is missing or cannot be served.
            ValueError, V4PrepareError: as the constructor.
        """
        model = read_model_fields(hf_config, _size("max_model_len", max_model_len))
        for name, value in (("block_size", block_size), ("max_rows", max_rows)):
            _size(name, value)
        decode_tokens = _size("spec_tokens", spec_tokens) + 1
        if max_tokens_per_seq is None:
            max_tokens_per_seq = decode_tokens if max_num_tokens is None else max_num_tokens
        if max_num_tokens is None:
            max_num_tokens = max_rows * decode_tokens
        if max_blocks_per_seq is None:
            max_blocks_per_seq = -(-max_model_len // block_size)
        return cls(
            *model[:1],
            spec_tokens,
            block_size,
            *model[1:],
            num_slots,
            num_blocks,
            max_blocks_per_seq,
            max_rows,
            max_num_tokens,
            max_tokens_per_seq,
            max_model_len,
            swa,
            comp_base,  # type: ignore[arg-type]
            hca_mode,  # type: ignore[arg-type]
        )

    @property
    def ring_rows(self) -> int:
        """R = W + k, rows of one window ring: all keys of a decode step are written before any
        is read, so the oldest key needed and the newest written lie W + k - 1 apart."""
        return self.window_size + self.spec_tokens

    def pool(self, ratio: int) -> int:
        """K(r), tokens pooled into one entry of the ratio: 2 * r1 for CSA, r2 for HCA."""
        return 2 * ratio if ratio == self.csa_ratio else ratio

    def state_rows(self, ratio: int) -> int:
        """K(r) + k, rows of one slot's compressor state for the ratio."""
        return self.pool(ratio) + self.spec_tokens

    @property
    def hca_list_length(self) -> int:
        """Tcap * (Lmax // r2): the most HCA rows that a step can list."""
        return self.max_num_tokens * (self.max_model_len // self.hca_ratio)

    @property
    def csa_list_length(self) -> int:
        """Tcap * min(topk, Lmax // r1): the most CSA entries that the tokens of a step choose."""
        return self.max_num_tokens * min(self.index_topk, self.max_model_len // self.csa_ratio)

    def plan_capacity(self, ratio: int) -> int:
        """cap_p, the most entries of the ratio that one step can finish."""
        return min(
            self.max_num_seqs * -(-self.max_tokens_per_seq // ratio),
            self.max_num_seqs + self.max_num_tokens // ratio,
        )

    def wplan_capacity(self, ratio: int) -> int:
        """cap_w, the most tokens of one step that go into the state rings of the ratio."""
        per_row = min(self.max_tokens_per_seq, self.pool(ratio))
        return min(self.max_num_tokens, self.max_num_seqs * per_row)

    @property
    def _num_window_rows(self) -> int:
        """Rows of all window rings, or of all blocks."""
        if self.swa == "ring":
            return self.num_slots * self.ring_rows
        return self.num_blocks * self.block_size

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_blocks(self) -> None:
        """Blocks hold whole entries; the block table holds the longest row."""
        if self.csa_ratio == self.hca_ratio:
            raise ValueError(
                f"hca_ratio: got {self.hca_ratio}, must differ from csa_ratio = {self.csa_ratio}, "
                "since entries of the two pool different numbers of tokens; correct one of them"
            )
        for name in ("csa_ratio", "hca_ratio"):
            ratio = getattr(self, name)
            if self.block_size % ratio:
                raise ValueError(
                    f"block_size: got {self.block_size}, must be a multiple of {name} = {ratio}; "
                    f"take for example {-(-self.block_size // ratio) * ratio}"
                )
        needed = -(-self.max_model_len // self.block_size)
        if self.max_blocks_per_seq < needed:
            raise ValueError(
                f"max_blocks_per_seq: got {self.max_blocks_per_seq}, must be at least {needed} = "
                f"ceil(max_model_len / block_size) = ceil({self.max_model_len} / "
                f"{self.block_size}); widen the block table or lower max_model_len"
            )

    def _check_int32(self) -> None:
        """Rows, table cells and list offsets are int32."""
        num_compressed = self.num_blocks * (self.block_size // min(self.csa_ratio, self.hca_ratio))
        owners = "num_slots" if self.swa == "ring" else "num_blocks"
        for name, rows, cure in (
            (owners, self._num_window_rows, "lower it"),
            ("comp_base", self.comp_base + num_compressed, "lower it or num_blocks"),
            ("max_blocks_per_seq", self.max_num_seqs * self.max_blocks_per_seq, "lower it"),
        ):
            if rows > INT32_MAX:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, which makes {rows} rows or cells; they "
                    f"are int32, at most {INT32_MAX}; {cure}"
                )
        widest = max(self.max_model_len // self.hca_ratio, self.index_topk, self.window_size)
        if self.max_num_tokens * widest > INT32_MAX:
            raise V4PrepareError(
                "E_INDPTR",
                -1,
                f"Tcap*max(Lmax//r2, topk, W)={self.max_num_tokens}*{widest}="
                f"{self.max_num_tokens * widest} > {INT32_MAX}, list offsets are int32; "
                "lower max_num_tokens",
            )

    def _choose_hca_mode(self) -> None:
        """List mode where the list is short enough."""
        list_bytes = 4 * self.hca_list_length
        if self.hca_mode is None:
            self._set("hca_mode", "list" if list_bytes <= HCA_LIST_BYTES_LIMIT else "table")
        elif self.hca_mode == "list" and list_bytes > HCA_LIST_BYTES_LIMIT:
            raise ValueError(
                f"hca_mode: got 'list', but max_num_tokens * (max_model_len // hca_ratio) = "
                f"{self.hca_list_length} rows are {list_bytes} bytes, allowed are at most "
                f"{HCA_LIST_BYTES_LIMIT}; use 'table' or lower max_num_tokens"
            )


def OUTPUT_SHAPES(cfg: V4PrepareConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every output of a step, all int32; `hca_idx` only in list mode."""
    rows, tokens = cfg.max_num_seqs, cfg.max_num_tokens
    shapes: dict[str, tuple[int, ...]] = {
        "positions": (tokens,),
        "req_of_token": (tokens,),
        "cu_q": (rows + 1,),
        "ctx": (rows,),
        "win_idx": (tokens, cfg.window_size),
        "win_len": (tokens,),
        "ext_len": (tokens,),
        "swa_write": (tokens,),
        "hca_indptr": (tokens + 1,),
        "csa_visible": (tokens,),
        "csa_indptr": (tokens + 1,),
    }
    if cfg.hca_mode == "list":
        shapes["hca_idx"] = (cfg.hca_list_length,)
    for name, ratio in (("r1", cfg.csa_ratio), ("r2", cfg.hca_ratio)):
        shapes[f"plan_{name}"] = (cfg.plan_capacity(ratio), 4)
        shapes[f"plan_dst_{name}"] = (cfg.plan_capacity(ratio),)
        shapes[f"wplan_{name}"] = (cfg.wplan_capacity(ratio), 4)
    shapes["counts"] = (8,)
    return shapes


def _size(name: str, value: Any) -> int:
    """A size as an int; refuses what is no integer or out of range."""
    low = int(name not in _MAY_BE_ZERO)
    is_integer = isinstance(value, SupportsIndex) and not isinstance(value, bool)
    if not is_integer or not low <= index(value) <= INT32_MAX:
        raise ValueError(f"{name}: got {value!r}, allowed are integers in {low}..{INT32_MAX}")
    return index(value)


def _check_choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Refuse a word that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(map(repr, allowed))}")
