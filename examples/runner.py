"""A runner of one's own: the engine schedules, caches and samples for any model.

The model of this example is the alphabet: after `c` comes `d`. The interface of a runner is
`fd_dsa.runner.protocol.Runner`: `input_batch`, which the engine fills before each step,
`vocab_size`, `execute_model`, and `info`, which names optional parts.

.venv/bin/python examples/runner.py
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from fd_dsa import LLM, SamplingParams
from fd_dsa.engine import LLMEngine, Tokenizer
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.protocol import RunnerInfo

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = len(LETTERS)


class AlphabetRunner:
    """Computes logits that favor the next letter, and the end after `z`."""

    vocab_size = len(LETTERS) + 1
    # this runner samples on no device and shows no selections
    info = RunnerInfo()

    def __init__(self, input_batch: InputBatch) -> None:
        self.input_batch = input_batch

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Run the step in `input_batch`.

        Args:
            logits_indices: int64 [n]; flat indices of the tokens whose logits the engine samples.

        Returns:
            float32 [n, vocab_size].
        """
        # The tokens of all rows, prompts and decodes, follow each other without padding. A model
        # with attention also reads the token counts of rows and block_tables, to find cached keys.
        last = self.input_batch.token_ids[logits_indices]
        return np.eye(self.vocab_size, dtype=np.float32)[np.minimum(last + 1, END)] * 10


def letter_tokenizer() -> Tokenizer:
    """A token for each letter, and one for the end."""
    vocab = {letter: index for index, letter in enumerate(LETTERS)}
    backend = Backend(models.BPE(vocab={**vocab, "<end>": END}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"})


def main() -> None:
    """Serve three prompts in one batch of two rows."""
    batch = InputBatch(max_num_seqs=2, max_num_tokens=16, max_blocks_per_seq=8, block_size=4)
    engine = LLMEngine(
        AlphabetRunner(batch),
        letter_tokenizer(),
        num_blocks=16,
        max_model_len=32,
        eos_token_ids=[END],
    )
    with LLM.from_engine(engine) as llm:
        params = SamplingParams(temperature=0, max_tokens=6)
        for output in llm.generate(["abc", "m", "wxy"], params):
            print(output.prompt, "->", output.outputs[0].text, output.outputs[0].finish_reason)


if __name__ == "__main__":
    main()
