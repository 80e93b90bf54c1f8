"""Sizes of a DeepSeek-V4 decode step, and the shapes of its outputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

from fd_dsa.errors import V4PrepareError
from fd_dsa.models.config_reader import FieldReader, read_json_object
from fd_dsa.models.deepseek_v4.config import CSA, HCA, DeepseekV4Config
from fd_dsa.models.registry import FAMILIES

INT32_MAX = 2**31 - 1
# above this many bytes `hca_idx` is not written, and its reader takes rows from the block table
HCA_LIST_BYTES_LIMIT = 64 * 2**20

_MAY_BE_ZERO = ("spec_tokens", "comp_base")

# an object with the fields as attributes, a mapping of them, or a path
ModelSource = Any

_NAMES = (
    "layer_types",
    "compress_rates",
    "compress_ratios",
    "sliding_window",
    "index_topk",
    "max_position_embeddings",
    "num_hidden_layers",
)


@dataclass(frozen=True)
class V4PrepareConfig:
    """Size limits for all steps of one builder. The letters appear in error messages.

    Args:
        window_size: W, keys of the sliding window, including the token's own.
        spec_tokens: k, maximum number of draft tokens of a decode row. A row with 1..k+1 tokens is
            a decode row, a longer one a prefill row.
        block_size: P, tokens per block of the block table, a multiple of both ratios.
        csa_ratio: r1, tokens per entry of a CSA layer, whose entries pool 2 * r1 tokens.
        hca_ratio: r2, tokens per entry of an HCA layer, whose entries pool r2 tokens.
        index_topk: topk, maximum number of CSA entries that the indexer selects for a token.
        num_slots: S, owners of window rings and compressor states.
        num_blocks: NB, physical blocks.
        max_blocks_per_seq: MB, columns of the block table, enough for max_model_len tokens.
        max_num_seqs: Bcap, rows of the buffers.
        max_num_tokens: Tcap, tokens of the buffers.
        max_tokens_per_seq: Qcap, maximum number of tokens of one row in a step.
        max_model_len: Lmax, maximum number of tokens of one row.
        swa: place of window keys: "ring" (W + k rows a slot) or "paged" (the blocks).
        comp_base: first row of compressed entries in a pool that stores them after the window keys.
            None = after all rings or blocks, 0 = separate pools.
        hca_mode: "list" writes `hca_idx`, "table" leaves its rows to the reader. None = "list"
            unless the list would exceed 64 MiB.

    Raises:
        ValueError: an invalid value. The message names the field, its value, the rule and the cure.
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
    comp_base: int = None  # type: ignore[assignment]  # an int after construction
    hca_mode: Literal["list", "table"] = None  # type: ignore[assignment]  # same

    def __post_init__(self) -> None:
        words = {"swa": ("ring", "paged"), "hca_mode": ("list", "table", None)}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name not in words:
                is_default = name == "comp_base" and value is None
                self._set(name, self._num_window_rows if is_default else _size(name, value))
            elif value not in words[name]:
                allowed = ", ".join(map(repr, words[name]))
                raise ValueError(f"{name}: got {value!r}, allowed are {allowed}")
        if self.hca_mode is None:
            is_short = 4 * self.hca_list_length <= HCA_LIST_BYTES_LIMIT
            self._set("hca_mode", "list" if is_short else "table")
        self._check_sizes()

    @classmethod
    def from_model(
        cls,
        hf_config: ModelSource,
        *,
        max_rows: int,
        max_model_len: int,
        spec_tokens: int = 0,
        block_size: int = 128,
        **sizes: Any,
    ) -> V4PrepareConfig:
        """Return the sizes for a DeepSeek-V4 model. Its config gives window, ratios and top-k.

        Args:
            hf_config: an object with the model's fields as attributes, a mapping of them, or the
                path of a config.json or of its folder. It must have `sliding_window`, `index_topk`
                and the layers, as transformers writes them (`layer_types`, with `compress_rates` by
                type) or as released checkpoints do (`compress_ratios`: one ratio a layer, 0 =
                window only, 4 = CSA, 128 = HCA). It may have `max_position_embeddings` and
                `num_hidden_layers`. Entries past `num_hidden_layers` belong to draft layers and are
                ignored.
            max_rows: rows of the buffers (`max_num_seqs`).
            sizes: `num_slots` and `num_blocks`. Optional: `swa`, `comp_base`, `hca_mode`,
                `max_num_tokens` (default: a decode step's, max_rows * (spec_tokens + 1)),
                `max_tokens_per_seq` (default: spec_tokens + 1, or `max_num_tokens` if given) and
                `max_blocks_per_seq` (default: enough for max_model_len).

        Raises:
            ConfigError: a field of the model is missing or unsupported.
            ValueError, V4PrepareError: same as the constructor.
        """
        own = {"max_rows": max_rows, "max_model_len": max_model_len}
        for name, value in (own | {"spec_tokens": spec_tokens, "block_size": block_size}).items():
            _size(name, value)
        sizes = {name: size for name, size in sizes.items() if size is not None}
        defaults: dict[str, Any] = {
            "max_num_tokens": max_rows * (spec_tokens + 1),
            "max_tokens_per_seq": sizes.get("max_num_tokens", spec_tokens + 1),
            "max_blocks_per_seq": -(-max_model_len // block_size),
        }
        return cls(
            **_model_fields(hf_config, max_model_len),
            spec_tokens=spec_tokens,
            block_size=block_size,
            max_num_seqs=max_rows,
            max_model_len=max_model_len,
            **(defaults | sizes),
        )

    @property
    def ring_rows(self) -> int:
        """R = W + k, rows of one window ring.

        All keys of a decode step are written before any is read. The oldest key needed and the
        newest key written are therefore W + k - 1 apart.
        """
        return self.window_size + self.spec_tokens

    def pool(self, ratio: int) -> int:
        """Return K(r), the tokens pooled into an entry: 2 * r1 for CSA, r2 for HCA."""
        return 2 * ratio if ratio == self.csa_ratio else ratio

    def source_rows(self, ratio: int) -> int:
        """Return K(r) + k, rows of one ring of sources, for the reason of `ring_rows`."""
        return self.pool(ratio) + self.spec_tokens

    @property
    def hca_list_length(self) -> int:
        """Maximum number of HCA rows that a step can list: Tcap * (Lmax // r2)."""
        return self.max_num_tokens * (self.max_model_len // self.hca_ratio)

    @property
    def csa_list_length(self) -> int:
        """Maximum number of CSA entries selected in a step: Tcap * min(topk, Lmax // r1)."""
        return self.max_num_tokens * min(self.index_topk, self.max_model_len // self.csa_ratio)

    def plan_capacity(self, ratio: int) -> int:
        """Return cap_p, the maximum number of entries of the ratio that one step can finish."""
        return min(
            self.max_num_seqs * -(-self.max_tokens_per_seq // ratio),
            self.max_num_seqs + self.max_num_tokens // ratio,
        )

    def wplan_capacity(self, ratio: int) -> int:
        """Return cap_w, the maximum number of tokens of a step for the ratio's state rings."""
        per_row = min(self.max_tokens_per_seq, self.pool(ratio))
        return min(self.max_num_tokens, self.max_num_seqs * per_row)

    @property
    def _num_window_rows(self) -> int:
        """Rows of all window rings, or of all blocks."""
        if self.swa == "ring":
            return self.num_slots * self.ring_rows
        return self.num_blocks * self.block_size

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        """Check that blocks hold whole entries, tables the longest row, int32 all offsets."""
        block, lowest = self.block_size, min(self.csa_ratio, self.hca_ratio)
        needed = -(-self.max_model_len // block)
        blocks_rule = "must be a multiple of {0} = {1}; take for example {2}"
        rows_rule = f"which makes {{}} rows or cells; they are int32, at most {INT32_MAX}; {{}}"
        owners = "num_slots" if self.swa == "ring" else "num_blocks"
        compressed = self.comp_base + self.num_blocks * (block // lowest)
        cells, list_bytes = self.max_num_seqs * self.max_blocks_per_seq, 4 * self.hca_list_length
        for is_bad, name, rule in (
            (
                self.csa_ratio == self.hca_ratio,
                "hca_ratio",
                f"must differ from csa_ratio = {self.csa_ratio}, since entries of the two pool "
                "different numbers of tokens; correct one of them",
            ),
            *(
                (block % r, "block_size", blocks_rule.format(name, r, -(-block // r) * r))
                for name, r in (("csa_ratio", self.csa_ratio), ("hca_ratio", self.hca_ratio))
            ),
            (
                self.max_blocks_per_seq < needed,
                "max_blocks_per_seq",
                f"must be at least {needed} = ceil(max_model_len / block_size) = "
                f"ceil({self.max_model_len} / {block}); widen the block table or lower "
                "max_model_len",
            ),
            *(
                (rows > INT32_MAX, name, rows_rule.format(rows, cure))
                for name, rows, cure in (
                    (owners, self._num_window_rows, "lower it"),
                    ("comp_base", compressed, "lower it or num_blocks"),
                    ("max_blocks_per_seq", cells, "lower it"),
                )
            ),
            (
                self.hca_mode == "list" and list_bytes > HCA_LIST_BYTES_LIMIT,
                "hca_mode",
                f"but max_num_tokens * (max_model_len // hca_ratio) = {self.hca_list_length} rows "
                f"are {list_bytes} bytes, allowed are at most {HCA_LIST_BYTES_LIMIT}; use 'table' "
                "or lower max_num_tokens",
            ),
        ):
            if is_bad:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, {rule}")
        widest = max(self.max_model_len // self.hca_ratio, self.index_topk, self.window_size)
        if self.max_num_tokens * widest > INT32_MAX:
            raise V4PrepareError(
                "E_INDPTR",
                -1,
                f"Tcap*max(Lmax//r2, topk, W)={self.max_num_tokens}*{widest}="
                f"{self.max_num_tokens * widest} > {INT32_MAX}, list offsets are int32; "
                "lower max_num_tokens",
            )


def OUTPUT_SHAPES(cfg: V4PrepareConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every output of a step, all int32.

    `hca_idx` only in list mode.
    """
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


def _size(name: str, value: object) -> int:
    """Return a size as an int, and refuse other types and values out of range."""
    low = int(name not in _MAY_BE_ZERO)
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        size = index(value)
        if low <= size <= INT32_MAX:
            return size
    raise ValueError(f"{name}: got {value!r}, allowed are integers in {low}..{INT32_MAX}")


def _model_fields(source: ModelSource, max_model_len: int) -> dict[str, Any]:
    """Return window, ratios and top-k of a model, read by its configuration class.

    Raises:
        ConfigError: an invalid field. The message names the field, its value, the rule and the
            cure.
    """
    data, name = source, "hf_config"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        data, name = read_json_object(path), str(path)
    elif not isinstance(source, Mapping):
        data = {one: getattr(source, one) for one in _NAMES if hasattr(source, one)}
        name = type(source).__name__
    found = {one: list(v) if isinstance(v, tuple) else v for one, v in data.items()}
    found = {one: found[one] for one in _NAMES if one in found}
    layers = found.get("layer_types") or found.get("compress_ratios")
    if found.get("num_hidden_layers") is None and isinstance(layers, list):
        found["num_hidden_layers"] = len(layers)
    # the calling engine has read the other fields
    model = DeepseekV4Config.read(FieldReader(found, name), FAMILIES["deepseek_v4"].defaults)
    if max_model_len > model.max_position_embeddings:
        allowed = f"at least max_model_len = {max_model_len}"
        field = "max_position_embeddings", model.max_position_embeddings
        raise FieldReader(found, name).error(*field, allowed, "lower max_model_len")
    return {
        "window_size": model.sliding_window,
        "csa_ratio": model.compress_rates[CSA],
        "hca_ratio": model.compress_rates[HCA],
        "index_topk": model.index_topk,
    }
