"""A model that knows nothing, over a tokenizer that can write everything."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from fd_dsa.engine.tokenizer import Tokenizer
from tests.engine import fakes
from tests.engine.fakes import Conversation

VOCAB_SIZE = 300
EOS = 1


def all_bytes_tokenizer(*added):
    """Byte-level: <bos>, <eos>, one token for each byte, and a few tokens of several bytes.

    Args:
        added: texts of further tokens.
    """
    vocab = {"<bos>": 0, "<eos>": EOS}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab.update({char: 2 + i for i, char in enumerate(alphabet)})
    merges = [("a", "b"), ("t", "r"), ("u", "e"), ("tr", "ue"), ('"', ":"), ("1", "2")]
    vocab.update({left + right: len(vocab) + i for i, (left, right) in enumerate(merges)})
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.add_tokens(["<think>", "</think>", *added])
    return Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>"}, Conversation())


TOKENIZER = all_bytes_tokenizer()


def make_engine(num_blocks=512, max_num_seqs=4, budget=16, spec_decoder=None):
    """An engine whose model knows nothing, over all bytes; the vocabulary has unused ids."""
    return fakes.make_engine(
        num_blocks=num_blocks,
        max_model_len=512,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        vocab_size=VOCAB_SIZE,
        tokenizer=TOKENIZER,
        spec_decoder=spec_decoder,
    )
