"""Small tokenizers of the kinds that model folders have."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from fd_dsa.config import demo_model_path

CORPUS = [
    "the quick brown fox jumps over the lazy dog. The fox's den isn't far; they'd say 12345 times"
    "\n\n  indented   text\r\n\t\ttabs naïve Ünïcödé ß 漢字かな交じり文と한국어 👩‍💻 emoji "
    "a\u0301 1,234,567.89 != x->y(); def f(a, b):\n        return a + b\n"
] * 50
# the splits of DeepSeek-V3's tokenizer.json
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def demo() -> Backend:
    """The demo model's: digits alone, byte-level BPE."""
    return Backend.from_file(str(demo_model_path() / "tokenizer.json"))


def byte_level_bpe(backend: Backend, vocab_size: int) -> Backend:
    """Train merges."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.ByteLevel()
    return backend


def deepseek_splits() -> pre_tokenizers.PreTokenizer:
    """DeepSeek-V3's words."""
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in DEEPSEEK_SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def deepseek() -> Backend:
    """DeepSeek-V3's pipeline: digits in threes, Chinese in runs, added tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = deepseek_splits()
    byte_level_bpe(backend, 600)
    bos = "<｜begin▁of▁sentence｜>"
    backend.add_special_tokens([bos, "<｜User｜>"])
    backend.add_tokens(["<think>", "</think>", "<｜place▁holder▁no▁100｜>"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def gpt2() -> Backend:
    """GPT-2's, with a space put in front, offsets that leave spaces out, and odd added tokens."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    byte_level_bpe(backend, 500)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_tokens(
        [
            AddedToken("  ", normalized=True),
            AddedToken("    ", normalized=False),
            AddedToken("<mask>", lstrip=True),
            AddedToken("<r>", rstrip=True),
            AddedToken("fox", single_word=True),
        ]
    )
    return backend


def digits_from_the_right() -> Backend:
    """Digits in threes that are counted from the end of a number."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}(?=(\p{N}{3})*(?!\p{N}))"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return byte_level_bpe(backend, 500)


def llama() -> Backend:
    """SentencePiece's BPE with byte fallback: all text between two added tokens is one word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    merges = [("▁", "a"), ("▁", "w"), ("▁w", "o"), ("o", "r"), ("t", "h"), ("▁", "th")]
    pieces += ["a", "b", "c", "d", "e", "h", "o", "r", "t", "w", *(a + b for a, b in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return backend


def unigram() -> Backend:
    """T5's: Unigram over words with a mark, runs of spaces made one, both ends stripped."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return backend


def wordpiece() -> Backend:
    """BERT's: letters without accents, each Chinese character a word."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, show_progress=False, special_tokens=["[UNK]", "[CLS]", "[SEP]"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    make.__name__: make
    for make in (demo, deepseek, gpt2, digits_from_the_right, llama, unigram, wordpiece)
}
