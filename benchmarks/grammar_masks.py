"""Steps whose outputs follow grammars, and the gaps that hostile grammars make for others.

    python -m benchmarks.grammar_masks --baseline CHECKOUT     # about eight minutes on 2 cores

The packages of this tree and of a checkout take turns, over the demo model's vocabulary and over
DeepSeek's 129,280 tokens. The model costs nothing, so a step is what the engine adds to it, and
workers compute no mask while a model runs. The processor time is that of the engine's thread.
Writes benchmarks/results/grammar_masks.json.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks._harness import compare_packages, in_turns, percentiles, workers

MODULE = "benchmarks.workers.grammar_masks:Masks"
VOCABULARIES = ("demo", "deepseek")
FORMS: dict[str, dict[str, Any]] = {
    "JSON object": {"json_object": True},
    "calls": {"grammar": 'start: e\ne: NAME "(" e ("," e)* ")" | NAME\nNAME: /[a-z]+/'},
}
ROWS = (1, 32)
STEPS, ROUNDS, ATTACK_S = 80, 3, 10.0
# numbers of requests with an ambiguous grammar each, and of outputs of each
ATTACKS = ((4, 8), (30, 2))
# the first one is honest: the gap without an attack
HOSTILE = {
    "letters": "start: /[a-z ]{900,1000}/",
    "ambiguous": "start: s\ns: s s | s s s | /[a-z ]/ |",
}


def compare(checkouts: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Measure honest forms and hostile grammars, the packages in turn."""
    cases, attacks = [], []
    for vocabulary in VOCABULARIES:
        with workers(MODULE, checkouts, vocabulary=vocabulary) as sides:
            for name, form in FORMS.items():
                for rows in ROWS:
                    case = {"op": "steps_ms", "form": form, "rows": rows, "steps": STEPS}
                    calls = {label: partial(side.call, **case) for label, side in sides.items()}
                    found: dict[str, Any] = {}
                    for label, times in in_turns(calls, rounds).items():
                        wall, cpu = zip(*chain(*times), strict=True)
                        found[label] = {"ms": percentiles(wall), "cpu_ms": percentiles(cpu)}
                    cases.append({"vocabulary": vocabulary, "form": name, "rows": rows, **found})
                    line = ", ".join(
                        f"{label} {times['ms']['p50']:.2f} ms ({times['cpu_ms']['p50']:.2f} ms)"
                        for label, times in found.items()
                    )
                    print(f"{vocabulary:8} {name:12} {rows:2} rows a step: {line}", flush=True)
            for name, grammar in HOSTILE.items():
                for attackers, outputs in ATTACKS:
                    case = {"op": "attack", "grammar": grammar, "seconds": ATTACK_S}
                    case |= {"attackers": attackers, "outputs": outputs}
                    gaps = {label: side.call(**case) for label, side in sides.items()}
                    attack = {"vocabulary": vocabulary, "grammar": name, "requests": attackers}
                    attacks.append(attack | {"outputs": outputs} | gaps)
                    line = ", ".join(
                        f"{label} {gap['gap_s']:.3f} s, "
                        f"{gap['stream_tokens']} tokens of the stream, {gap['ends']}"
                        for label, gap in gaps.items()
                    )
                    print(f"{vocabulary:8} gap beside {attackers} x {name}: {line}", flush=True)
    return {"cases": cases, "attacks": attacks}


main = partial(compare_packages, "grammar_masks", __doc__, compare, ROUNDS)

if __name__ == "__main__":
    sys.exit(main())
