"""Stream two answers at the same time, and stop one of them early.

.venv/bin/python examples/stream.py
"""

from __future__ import annotations

from fd_dsa import LLM, SamplingParams

QUESTIONS = ("What is the capital of France?", "What is the capital of Italy?")

with LLM(max_num_seqs=2) as llm:
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=24)
    # Every step of the engine yields an output of each running request. The end of request_id is
    # the index of the conversation.
    for output in llm.chat(conversations, params, stream=True):
        index = int(output.request_id.rpartition("-")[2])
        if output.new_text:
            print(f"[{index}] {output.new_text!r}")
        if output.finished:
            print(f"[{index}] complete: {output.text!r}")

    # Closing the iterator aborts what is unfinished.
    stream = llm.chat(conversations[0], params, stream=True)
    first = next(stream)
    stream.close()
    print("running requests after close:", llm.stats().num_running)
