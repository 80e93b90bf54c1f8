"""Trains the tokenizer: byte-level BPE, every digit its own token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import CHAT_TEMPLATE, MODEL, SPECIAL_TOKENS
from .sources import Sources
from .synth import Generator
from .synth.chinese import chinese_chat

DOCUMENTS = 14000
CHINESE_DOCUMENTS = 4000
LONGEST = 12  # bytes of an entry: no whole sentence of a closed list becomes one
DOCUMENT_CHARACTERS = 1500


def _texts(sources: Sources) -> Iterator[str]:
    """Yield the texts and some generated documents, Chinese ones twice to merge words."""
    yield sources.tales
    yield sources.play
    for question, answer in sources.problems[:4000]:
        yield question + "\n" + answer
    for request, answer in sources.instructions:
        yield request + "\n" + answer
    generator = Generator(1, sources)
    for _ in range(DOCUMENTS):
        for _, text in generator.document():
            yield text[:DOCUMENT_CHARACTERS]
    for _ in range(CHINESE_DOCUMENTS):
        for _, text in chinese_chat(generator.pieces):
            yield text


def train_tokenizer(sources: Sources) -> Tokenizer:
    """Return a tokenizer of as many entries as the model has, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(sources), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[2],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
