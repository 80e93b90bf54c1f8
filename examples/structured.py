"""Structured output: an answer that is JSON of a schema, and one of a few texts.

It needs the extra `structured`, which `make serve` installs.

.venv/bin/python examples/structured.py
"""

from __future__ import annotations

import json

from fd_dsa import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}

with LLM(max_num_seqs=1) as llm:
    messages = [{"role": "user", "content": "What is the capital of France?"}]

    form = StructuredOutputsParams(json=SCHEMA)
    params = SamplingParams(temperature=0, max_tokens=256, structured_outputs=form)
    output = llm.chat(messages, params)[0].outputs[0]
    # "stop": the form is complete. After "length" the text would end in the middle of it. The
    # grammar guarantees only the form, so a small model may be wrong about the content.
    print("ended by:", output.finish_reason)
    print("keys:", sorted(json.loads(output.text)))

    form = StructuredOutputsParams(choice=["Paris", "Rome", "Berlin"])
    params = SamplingParams(temperature=0, max_tokens=8, structured_outputs=form)
    print("choice:", llm.chat(messages, params)[0].outputs[0].text)
