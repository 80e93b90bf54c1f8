"""Documents as rows of tokens: encoding, packing in worker processes, a pool of rows for training.

A row is uint16 [length + 1]; bit 15 marks tokens that are trained on (answers and raw text, not
requests).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .config import ASSISTANT, BOS, EOS, PAD, ROLE_TOKENS

TRAINED = 0x8000
OPEN_ROWS = 8
KINDS = ("short", "long", "longest")
UNREAD = {"short": 40, "long": 8, "longest": 8}  # shards of each kind kept ready
LONG_SHARE = {"short": 0.0, "long": 0.12, "longest": 0.08}  # of long documents
CHARACTERS = 3.6  # of a token, at most: documents that come out longer than a row are left out
PATIENCE = 120  # seconds to wait for a shard
BLOCKS = 256  # shards of a kind kept in memory


def row_lengths(context: int) -> dict[str, int]:
    """Return tokens of a row of each kind: an eighth, a half, the whole of the context."""
    return {"short": context // 8, "long": context // 2, "longest": context}


def encode(tokenizer, document) -> list[int]:
    """Return the token ids of a document. Bit 15 marks tokens that are trained on.

    Segments are encoded one by one; the special tokens cut the text, so that the rendered chat
    template gives the same ids.
    """
    ids = [BOS]
    for role, text in document:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        if role == "raw":
            ids += [t | TRAINED for t in tokens]
        elif role == "assistant":
            ids += [ASSISTANT, *(t | TRAINED for t in tokens), EOS | TRAINED]
        else:
            ids += [ROLE_TOKENS[role], *tokens]
    return ids


def conversation_ids(tokenizer, messages: list[tuple[str, str]]) -> list[int]:
    """Return ids of a conversation with the generation prompt at its end."""
    ids = [BOS]
    for role, text in messages:
        ids += [ROLE_TOKENS[role], *tokenizer.encode(text, add_special_tokens=False).ids]
        if role == "assistant":
            ids.append(EOS)
    return [*ids, ASSISTANT]


def pack(draw: Callable[[], list[int]], length: int, count: int) -> np.ndarray:
    """Return `count` rows of `length` tokens, first fit over a few open rows.

    Documents are never split.
    """
    rows = np.full((count, length), PAD, np.uint16)
    bins: list[list[int]] = [[] for _ in range(OPEN_ROWS)]
    i = 0
    while i < count:
        ids = draw()
        if len(ids) > length:
            continue
        room = next((b for b in bins if len(b) + len(ids) <= length), None)
        if room is not None:
            room.extend(ids)
            continue
        fullest = max(range(OPEN_ROWS), key=lambda b: len(bins[b]))
        rows[i, : len(bins[fullest])] = bins[fullest]
        i += 1
        bins[fullest] = list(ids)
    return rows


def _wanted(shards: Path, worker: int) -> str | None:
    """Return the kind of shard that is needed most, None if enough of all are ready."""
    ready = {k: len(list(shards.glob(k + "_*.npy"))) / UNREAD[k] for k in KINDS}
    if min(ready.values()) >= 1:
        return None
    return min(KINDS, key=lambda k: (ready[k], (KINDS.index(k) - worker) % len(KINDS)))


def write_shards(data, tokenizer_folder, shards, seed: int, context: int, tokens: int) -> None:
    """Write .npy files of about `tokens` tokens, as many as UNREAD, until a file "stop" is there.

    Raises:
        FileNotFoundError: a text file is missing.
    """
    from tokenizers import Tokenizer

    from .sources import Sources
    from .synth import Generator

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
    generator, chance = Generator(1000 + seed, Sources.load(data)), random.Random(seed)
    shards, lengths, number = Path(shards), row_lengths(context), 0
    while not (shards / "stop").exists():
        kind = _wanted(shards, seed)
        if kind is None:
            time.sleep(0.3)
            continue

        def draw(kind: str = kind) -> list[int]:
            if chance.random() < LONG_SHARE[kind]:
                return encode(tokenizer, generator.long_document(int(lengths[kind] * CHARACTERS)))
            return encode(tokenizer, generator.document())

        count = max(1, tokens // lengths[kind])
        unfinished = shards / f"unfinished_{kind}_{seed:05d}_{number:04d}.npy"
        np.save(unfinished, pack(draw, lengths[kind] + 1, count))
        unfinished.rename(shards / unfinished.name.removeprefix("unfinished_"))
        number += 1


class Pool:
    """Rows of one kind: each new shard once, then older rows again.

    The file of a new shard is removed.
    """

    def __init__(self, shards: str | Path, kind: str, device: str):
        self.shards, self.kind, self.device = Path(shards), kind, device
        self.blocks: list = []
        self.queue: list[tuple[int, int]] = []
        self.taken, self.again = 0, 0

    def _next(self) -> bool:
        """Queue the rows of a new or an old shard. Returns False without a shard."""
        import torch

        path = next(iter(sorted(self.shards.glob(self.kind + "_*.npy"))), None)
        if path is not None:
            block = torch.from_numpy(np.load(path).astype(np.int32)).to(self.device)
            path.unlink()
            place = self.taken % BLOCKS
            self.blocks[place : place + 1] = [block]
            self.taken += 1
        elif self.blocks:
            place = random.randrange(len(self.blocks))
            self.again += 1
        else:
            return False
        rows = list(range(self.blocks[place].shape[0]))
        random.shuffle(rows)
        self.queue = [(place, i) for i in rows] + self.queue
        return True

    def batch(self, count: int):
        """Return ids [count, T] int64, targets [count * T] int64, weights [count * T] float32.

        Raises:
            TimeoutError: no shard came for two minutes.
        """
        import torch

        began = time.time()
        while len(self.queue) < count:
            if self._next():
                continue
            if time.time() - began > PATIENCE:
                raise TimeoutError(
                    f"--shards: no {self.kind}_*.npy came to {self.shards} for {PATIENCE} s; "
                    "see what the data processes printed"
                )
            time.sleep(0.2)
        taken, self.queue[-count:] = self.queue[-count:], []
        tokens = torch.stack([self.blocks[b][i] for b, i in taken])
        ids = (tokens & (TRAINED - 1)).long()
        trained = (tokens[:, 1:] >= TRAINED).reshape(-1).float()
        return ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1), trained
