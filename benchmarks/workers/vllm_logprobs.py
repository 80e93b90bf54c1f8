"""vLLM's greedy tokens and their likeliest alternatives: MODEL, prompts and result as JSON files.

Imports nothing of this project: it runs where vLLM's packages are.
"""

import json
import sys

NEW_TOKENS, TOP = 64, 20


def main() -> None:
    """Read the prompts, write [{"token_ids", "top": [[[token, logprob], ...], ...]}, ...]."""
    from vllm import LLM, SamplingParams

    model, prompts, out = sys.argv[1:4]
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=9216,
        max_num_seqs=8,
        max_num_batched_tokens=8192,
        kv_cache_dtype="fp8",
        gpu_memory_utilization=0.6,
        enforce_eager=True,
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=TOP, detokenize=False
    )
    with open(prompts) as file:
        given = [{"prompt_token_ids": ids} for ids in json.load(file)]
    answers = []
    for output in llm.generate(given, params):
        one = output.outputs[0]
        top = [[[token, score.logprob] for token, score in row.items()] for row in one.logprobs]
        answers.append({"token_ids": list(one.token_ids), "top": top})
    with open(out, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
