"""A runner without a model: its logits are a hash of the tokens it finds in its paged cache."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from fd_dsa.chat.template import ChatTemplate
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.step_times import StepTable
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.protocol import RunnerInfo

VOCAB_SIZE = 40
EOS = 1


class FakeRunner:
    """Keeps token ids in a paged cache, as a model would keep keys.

    The logits of a token follow from all tokens of its row up to it, read back through the block
    table: a wrong block or a lost chunk changes them. No other row may have a block that is
    written.

    Args:
        input_batch: as the engine fills it.
        num_blocks: blocks of the cache.
        vocab_size: columns of the logits.
    """

    info = RunnerInfo()

    def __init__(
        self, input_batch: InputBatch, num_blocks: int, vocab_size: int = VOCAB_SIZE
    ) -> None:
        self.input_batch = input_batch
        self.vocab_size = vocab_size
        self.block_size = input_batch.block_size
        self.cache = np.full((num_blocks, self.block_size), -1, np.int64)
        self.steps: list[dict[int, tuple[int, int, bool]]] = []
        self.fail_at: int | None = None
        self.nan_after: int | None = None

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Write the step's tokens into the cache, then hash what the rows hold."""
        batch = self.input_batch
        if self.fail_at is not None and len(self.steps) >= self.fail_at:
            raise OSError("the device is gone")
        histories: list[list[int]] = []
        step = {}
        begin = 0
        for row in range(batch.num_rows):
            num_new = int(batch.num_scheduled_tokens[row])
            if num_new == 0:
                continue
            cached = int(batch.num_computed_tokens[row])
            step[row] = (num_new, cached, bool(batch.num_chunk_tokens[row]))
            for j in range(num_new):
                block = batch.block_tables[row, (cached + j) // self.block_size]
                assert block >= 0, f"row {row} has no block for token {cached + j}"
                assert (batch.block_tables == block).sum() == 1, f"block {block} is shared"
                self.cache[block, (cached + j) % self.block_size] = batch.token_ids[begin + j]
            table = batch.block_tables[row]
            tokens = self.cache[table[table >= 0]].reshape(-1)
            histories += [tokens[: cached + j + 1].tolist() for j in range(num_new)]
            begin += num_new
        self.steps.append(step)
        rows = [self.logits_after(histories[index]) for index in logits_indices]
        return np.array(rows, np.float32).reshape(len(rows), self.vocab_size)

    def logits_after(self, history: list[int]) -> np.ndarray:
        """Logits as a function of the whole history."""
        seed = zlib.crc32(np.array(history, np.int64).tobytes())
        logits = np.random.default_rng(seed).normal(size=self.vocab_size).astype(np.float32)
        if self.nan_after is not None and history[-1] == self.nan_after:
            logits[3] = np.nan
        return logits


def expected_greedy(prompt: list[int], num_tokens: int, eos: int | None = EOS) -> list[int]:
    """Compute the tokens of a greedy request without an engine."""
    runner = FakeRunner(InputBatch(1, 1, 1, 1), 1)
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(runner.logits_after(tokens).argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


class Conversation(ChatTemplate):
    """A chat template that joins the texts of all messages."""

    def __init__(self) -> None:
        super().__init__("{% for message in messages %}{{ message.content }}{% endfor %}", {})


def byte_tokenizer(vocab_size: int = VOCAB_SIZE, chats: bool = False) -> Tokenizer:
    """Byte-level tokenizer of single letters: id 0 <bos>, 1 <eos>, then a, b, c ..."""
    vocab = {"<bos>": 0, "<eos>": 1}
    vocab.update({chr(ord("a") + i): i + 2 for i in range(26)})
    vocab.update({chr(ord("A") + i): i + 28 for i in range(vocab_size - 28)})
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    special_tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return Tokenizer(backend, special_tokens, Conversation() if chats else None)


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 64,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    seed: int = 0,
    enable_prefix_caching: bool = True,
    target_gap_s: float = 0.0,
    chats: bool = False,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    spec_decoder: SpecDecoder | None = None,
    step_table: StepTable | None = None,
) -> LLMEngine:
    """Engine over a fake runner; `engine.runner` is that runner."""
    blocks_per_seq = -(-max_model_len // block_size)
    batch = InputBatch(max_num_seqs, max_num_batched_tokens, blocks_per_seq, block_size)
    return LLMEngine(
        FakeRunner(batch, num_blocks, vocab_size),
        tokenizer or byte_tokenizer(chats=chats),
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        eos_token_ids=[EOS],
        target_gap_s=target_gap_s,
        enable_prefix_caching=enable_prefix_caching,
        seed=seed,
        spec_decoder=spec_decoder,
        step_table=step_table,
    )


def random_clock(seed: int) -> Callable[[], float]:
    """A clock that moves by microseconds to minutes between two calls, or not at all."""
    draw = random.Random(seed)
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += draw.choice([0.0, 10 ** draw.uniform(-6, 2)])
        return now

    return clock


def run_all(engine: LLMEngine, max_steps: int = 5000) -> dict[str, list]:
    """Step until nothing is left; the outputs of each request in order."""
    outputs: dict[str, list] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"not finished after {max_steps} steps")
