"""Tagged memory of the simulator: each row holds the name of the key that was written last.

A tag names one version of one token: request, position, version. A rejected draft and the token
that replaces it differ in the version. Requests with a common prefix hold the same tags there, as
they hold the same keys. A compressed entry carries the tag of the last token that it pools, and
the kind of the entry. Freed memory is poisoned, so a read of it cannot be right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

POSITION_BITS, VERSION_BITS = 21, 16
NEVER, FREED, HOLLOW = -1, -2, -3
"""Tags of rows that no one wrote, that were freed, and of entries pooled from missing sources."""

NAMES = {NEVER: "a row never written", FREED: "a freed row", HOLLOW: "an entry without sources"}
ENTRY_KIND = {"window": 0, "r1": 1 << 60, "r2": 2 << 60}


class Compressor(NamedTuple):
    """One ratio: its name in the outputs, the ratio, and how many tokens an entry pools."""

    name: str
    ratio: int
    num_sources: int


def compressors(cfg: Any) -> list[Compressor]:
    """The overlapping compressor of ratio 1 (CSA) and the plain one of ratio 2 (HCA)."""
    return [
        Compressor("r1", cfg.csa_ratio, 2 * cfg.csa_ratio),
        Compressor("r2", cfg.hca_ratio, cfg.hca_ratio),
    ]


def first_compressed_row(cfg: Any) -> int:
    """Row of the pool where compressed rows start."""
    if cfg.comp_base is not None:
        return int(cfg.comp_base)
    return num_window_rows(cfg)


def num_window_rows(cfg: Any) -> int:
    """Rows of the window pool: one ring a slot, or the pages."""
    if cfg.swa == "ring":
        return int(cfg.num_slots * (cfg.window_size + cfg.spec_tokens))
    return int(cfg.num_blocks * cfg.block_size)


def make_tags(request: int, positions: np.ndarray, version: int) -> np.ndarray:
    """int64 tags of one version of some tokens of a request."""
    return ((request << POSITION_BITS) + positions.astype(np.int64) << VERSION_BITS) + version


class TokenName(NamedTuple):
    """What a tag says."""

    kind: str
    request: int
    position: int
    version: int

    def __str__(self) -> str:
        what = "key" if self.kind == "window" else f"entry {self.kind}"
        return f"{what} of request {self.request} position {self.position} v{self.version}"


def name_of(tag: int) -> TokenName:
    """The token of a tag that is not negative."""
    kinds = [kind for kind, bit in ENTRY_KIND.items() if tag >> 60 == bit >> 60]
    number = tag & ((1 << 60) - 1)
    token = number >> VERSION_BITS
    return TokenName(
        kinds[0],
        token >> POSITION_BITS,
        token & ((1 << POSITION_BITS) - 1),
        number & ((1 << VERSION_BITS) - 1),
    )


def describe(tag: int) -> str:
    """The tag in words."""
    return NAMES[tag] if tag < 0 else str(name_of(tag))


class Violation(AssertionError):
    """A step whose arrays make a layer read or write what it must not.

    Attributes:
        kind: what went wrong, one of a few short names that tests compare.
        part: which list it was found in: "window", "r1", "r2", "sources of r1", "layout", ...
        text: the first wrong row or cell.
    """

    def __init__(self, kind: str, part: str, text: str) -> None:
        self.kind, self.part, self.text = kind, part, text
        super().__init__(f"{part}: {kind}: {text}")


def kind_of_wrong_read(tag: int, wanted: int) -> str:
    """Why reading `tag` in place of `wanted` is wrong, in one short name."""
    if tag < 0:
        return {NEVER: "unwritten row", FREED: "freed row", HOLLOW: "hollow entry"}[tag]
    found, right = name_of(tag), name_of(max(wanted, 0))
    if found.kind != right.kind:
        return "wrong kind"
    if found.request != right.request:
        return "foreign key"
    return "wrong position" if found.position != right.position else "old version"


class Memory:
    """The caches of one layer of each kind, as tags, and who may write where.

    Attributes:
        window: int64 [rows] of the ring or the pages.
        entries: int64 [blocks * (P / ratio)] of each compressor, without `comp_base`.
        states: int64 [slots, pool + drafts] of each compressor: sources that are not pooled yet.
        slot_owner: which request (its `handle`) owns a slot, -1 for none.
        block_writer: the only request that may write into a block, -1 for none.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.ring_rows = cfg.window_size + cfg.spec_tokens
        self.window = np.full(num_window_rows(cfg), NEVER, np.int64)
        self.entries, self.states = {}, {}
        for c in compressors(cfg):
            rows = cfg.num_blocks * cfg.block_size // c.ratio
            self.entries[c.name] = np.full(rows, NEVER, np.int64)
            shape = (cfg.num_slots, c.num_sources + cfg.spec_tokens)
            self.states[c.name] = np.full(shape, NEVER, np.int64)
        self.slot_owner = np.full(cfg.num_slots, -1, np.int64)
        self.block_writer = np.full(cfg.num_blocks, -1, np.int64)

    def free_slot(self, slot: int) -> None:
        """Poison the rings of a slot."""
        self.slot_owner[slot] = -1
        if self.cfg.swa == "ring":
            self.window[slot * self.ring_rows : (slot + 1) * self.ring_rows] = FREED
        for ring in self.states.values():
            ring[slot] = FREED

    def free_block(self, block: int) -> None:
        """Poison what a block holds."""
        self.block_writer[block] = -1
        if self.cfg.swa == "paged":
            self._rows(self.window, block, self.cfg.block_size)[:] = FREED
        for c in compressors(self.cfg):
            self._rows(self.entries[c.name], block, self.cfg.block_size // c.ratio)[:] = FREED

    def window_writers(self, rows: np.ndarray) -> np.ndarray:
        """Which request may write each window row."""
        if self.cfg.swa == "ring":
            return self.slot_owner[rows // self.ring_rows]
        return self.block_writer[rows // self.cfg.block_size]

    def install(self, tokens: np.ndarray, slot: int, blocks: list[int]) -> None:
        """Fill the caches of a request as if `tokens` had been run: a cache sent from elsewhere.

        Only what later tokens may read is there: the rest of the rings stays as it was.
        """
        cfg, n = self.cfg, len(tokens)
        positions = np.arange(n)
        if cfg.swa == "ring":
            x = positions[max(0, n - cfg.window_size + 1) :]
            self.window[slot * self.ring_rows + x % self.ring_rows] = tokens[x]
        else:
            pages = np.array(blocks)[positions // cfg.block_size]
            self.window[pages * cfg.block_size + positions % cfg.block_size] = tokens
        for c in compressors(cfg):
            e = np.arange(n // c.ratio)
            per_block = cfg.block_size // c.ratio
            rows = np.array(blocks)[e // per_block] * per_block + e % per_block
            kind = ENTRY_KIND[c.name]
            self.entries[c.name][rows] = tokens[(e + 1) * c.ratio - 1] + kind
        self.install_states(tokens, slot)

    def install_states(self, tokens: np.ndarray, slot: int) -> None:
        """Fill the state rings of a slot with the sources that entries to come still pool."""
        n = len(tokens)
        for c in compressors(self.cfg):
            oldest = max(0, (n // c.ratio + 1) * c.ratio - c.num_sources)
            x = np.arange(oldest, n)
            ring = self.states[c.name][slot]
            ring[x % len(ring)] = tokens[x]

    @staticmethod
    def _rows(pool: np.ndarray, block: int, per_block: int) -> np.ndarray:
        """The rows of one block."""
        return pool[block * per_block : (block + 1) * per_block]
