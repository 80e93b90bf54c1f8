"""Chat from Python: a conversation of two turns, without a server.

.venv/bin/python examples/chat.py
"""

from __future__ import annotations

from fd_dsa import LLM, SamplingParams

# Without a model folder LLM loads the demo model of the package. Whole blocks are cached, so short
# conversations need short blocks.
with LLM(max_num_seqs=1, block_size=16) as llm:
    params = SamplingParams(temperature=0, max_tokens=48)
    messages = [{"role": "user", "content": "Hello! What can you do?"}]
    answer = llm.chat(messages, params)[0].outputs[0]
    print("assistant:", answer.text)
    print("ended by:", answer.finish_reason, "after", len(answer.token_ids), "tokens")

    # The model remembers nothing, so the next turn sends the whole conversation. The blocks of its
    # beginning come from the prefix cache.
    messages.append({"role": "assistant", "content": answer.text})
    messages.append({"role": "user", "content": "What is the capital of France?"})
    output = llm.chat(messages, params)[0]
    print("assistant:", output.outputs[0].text)
    print("prompt tokens:", len(output.prompt_token_ids), "cached:", output.num_cached_tokens)
