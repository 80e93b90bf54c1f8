"""A tiny random model with a tokenizer as large as DeepSeek-V3.2's, and as long a context."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.engine.tokenizer_kinds import deepseek_splits
from tests.models.folders import TINY, YARN, write_folder

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 129_280
NUM_MERGED = 128_000
MAX_MODEL_LEN = 163_840
TEXTS = ("*.md", "docs/**/*.md", "fd_dsa/**/*.py", "fd_dsa/**/*.txt", "tests/**/*.py")
TEMPLATE = (
    "{% for m in messages %}<｜{{ m['role'] }}｜>{{ m['content'] }}{% endfor %}<｜assistant｜>"
)
SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
ROLES = ("<｜system｜>", "<｜user｜>", "<｜assistant｜>")
# runs that real vocabularies of this size hold as one token, the longest of 128 characters
RUNS = ("Ġ", "-", "=", "*", "/", "_", "#", ".")
LONGEST_RUN = 128


def _texts() -> Iterator[str]:
    """What the repository says about itself, in prose and in code."""
    for pattern in TEXTS:
        for path in sorted(ROOT.glob(pattern)):
            yield path.read_text("utf-8")


def _fill(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Add merges until there are `NUM_MERGED` tokens: long runs, then pairs of known tokens."""

    def add(left: str, right: str) -> None:
        if left + right not in vocab and len(vocab) < NUM_MERGED:
            vocab[left + right] = len(vocab)
            merges.append((left, right))

    draw, parts = random.Random(0), sorted(vocab)
    for run in RUNS:
        length = 1
        while length < LONGEST_RUN:
            add(run * length, run * length)
            length *= 2
    while len(vocab) < NUM_MERGED:
        add(draw.choice(parts), draw.choice(parts))


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries, special tokens and holders included.

    The texts give some tens of thousands of merges; the rest are made up, so that tables and
    searches have their real size.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = deepseek_splits()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_MERGED - LONGEST_RUN * len(RUNS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_texts(), trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]
    _fill(vocab, merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = deepseek_splits()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    rest = VOCAB_SIZE - tokenizer.get_vocab_size() - len(ROLES)
    holders = [f"<｜place▁holder▁no▁{number}｜>" for number in range(rest)]
    tokenizer.add_tokens([AddedToken(text, special=True) for text in (*ROLES, *holders)])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def write_model(folder: Path) -> Path:
    """A model folder: random weights of a few megabytes, the tokenizer, a chat template."""
    tokenizer = train_tokenizer()
    fields = TINY | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rope_scaling": YARN,
        "index_topk": 2048,
        "bos_token_id": tokenizer.token_to_id(SPECIAL[0]),
        "eos_token_id": tokenizer.token_to_id(SPECIAL[1]),
    }
    write_folder(folder, fields)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
