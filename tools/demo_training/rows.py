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
SHORT, LONG = 1024, 4096


def encode(tokenizer, document) -> list[int]:
    """Token ids of a document; bit 15 set where the token is trained on.

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
    """Ids of a conversation with the generation prompt at its end."""
    ids = [BOS]
    for role, text in messages:
        ids += [ROLE_TOKENS[role], *tokenizer.encode(text, add_special_tokens=False).ids]
        if role == "assistant":
            ids.append(EOS)
    return [*ids, ASSISTANT]


def pack(draw: Callable[[], list[int]], length: int, count: int) -> np.ndarray:
    """`count` rows of `length` tokens, first fit over a few open rows; documents never split."""
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


def write_shards(data, tokenizer_folder, shards, seed: int, plan: list[str], rows: int) -> None:
    """Writes one .npy file per entry of the plan ("short" or "long"); ends early at a file "stop".

    Long shards hold a quarter of the rows, and 12 % of their documents are long ones.
    """
    from tokenizers import Tokenizer

    from .sources import Sources
    from .synth import Generator

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
    generator, chance = Generator(1000 + seed, Sources.load(data)), random.Random(seed)
    shards = Path(shards)
    for n, kind in enumerate(plan):

        def draw(long: bool = kind == "long") -> list[int]:
            wanted = long and chance.random() < 0.12
            document = generator.long_document() if wanted else generator.document()
            return encode(tokenizer, document)

        length, count = (LONG + 1, rows // 4) if kind == "long" else (SHORT + 1, rows)
        unfinished = shards / f"unfinished_{kind}_{seed:03d}_{n:03d}.npy"
        np.save(unfinished, pack(draw, length, count))
        unfinished.rename(shards / f"{kind}_{seed:03d}_{n:03d}.npy")
        if (shards / "stop").exists():
            return


class Pool:
    """Rows of one length; takes up new shards as they appear, reuses old ones when none is left."""

    def __init__(self, shards: str | Path, kind: str, device: str):
        self.shards, self.kind, self.device = Path(shards), kind, device
        self.seen: set[Path] = set()
        self.rows: list = []
        self.queue: list[tuple[int, int]] = []
        self.rounds = 0

    def refill(self) -> None:
        """Loads the shards that have come since; their rows are used before older ones."""
        import torch

        for path in sorted(self.shards.glob(self.kind + "_*.npy")):
            if path in self.seen:
                continue
            self.seen.add(path)
            block = torch.from_numpy(np.load(path).astype(np.int32)).to(self.device)
            new = [(len(self.rows), i) for i in range(block.shape[0])]
            random.shuffle(new)
            self.rows.append(block)
            self.queue += new

    def batch(self, count: int):
        """ids [count, T] int64, targets [count * T] int64, weights [count * T] float32."""
        import torch

        while len(self.queue) < count:
            self.refill()
            if len(self.queue) >= count:
                break
            if not self.rows:
                time.sleep(0.2)
                continue
            self.queue = [(b, i) for b, t in enumerate(self.rows) for i in range(t.shape[0])]
            random.shuffle(self.queue)
            self.rounds += 1
        taken, self.queue[-count:] = self.queue[-count:], []
        tokens = torch.stack([self.rows[b][i] for b, i in taken])
        ids = (tokens & (TRAINED - 1)).long()
        trained = (tokens[:, 1:] >= TRAINED).reshape(-1).float()
        return ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1), trained
