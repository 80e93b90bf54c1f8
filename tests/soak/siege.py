"""One kind of hostile request at a time, and what the server's other clients notice of it.

    python -m tests.soak.siege                       # all kinds, three times each: 35 minutes
    python -m tests.soak.siege --large               # 129,280 tokens, a context of 163,840
    python -m tests.soak.siege --case "15 MB" --repeats 1

Each repeat starts a server with default flags, and lets one stream run and /health be probed. Then
the requests of one kind are sent, the memory gets 60 seconds to come back, and the requests are
sent again, with a SIGTERM while the first is running. Ends with status 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks._harness import Worker, environment, table_row, write_json
from tests.serve.processes import Server, serving
from tests.soak import large_model
from tests.soak.siege_cases import CASES
from tests.soak.siege_requests import Facts
from tests.soak.watching import Watch

DEMO = Facts(max_model_len=8192, vocab_size=4096)
LARGE = Facts(large_model.MAX_MODEL_LEN, large_model.VOCAB_SIZE)
STREAM = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}
PROMPT_ROOM = 32
MIB = 2**20
FIRST_WITHIN_S = 60.0
# without an attack, for the gap that the machine itself makes
ALONE_S = 3.0
# after the last answer: what it left to do is part of it
AFTERWARDS_S = 1.0
# from the last byte to the signal, so that the request is running
IN_WORK_S = 0.2
# a stall of so long is no stall any more: the memory of such a server need not be waited for
FROZEN_S = 10.0
EXIT_MARGIN_S = 10.0
HEAD = (
    *("requests", "answers", "/health, s", "gap, s (alone)", "memory grows by, MiB"),
    *("left after 60 s, MiB", "log grows by, KiB", "SIGTERM to the end, s"),
)


@dataclass(frozen=True)
class Bounds:
    """Bounds on what one kind of request may do to the others.

    Attributes:
        health_s: longest answer of /health.
        gap_s: longest gap of a stream.
        growth_mib: most memory beyond that before, without what was planned.
        left_mib: the same once `settle_s` have gone by.
        log_kib: growth of the log.
        drain_s: from SIGTERM to the end of the process; --shutdown-timeout and the last answers.
        patience_s: after which nobody waits for the hostile request's own answer any more.
        settle_s: for which the memory is waited for.
    """

    health_s: float = 0.5
    gap_s: float = 0.5
    growth_mib: float = 200.0
    left_mib: float = 50.0
    log_kib: float = 1024.0
    drain_s: float = 35.0
    patience_s: float = 60.0
    settle_s: float = 60.0


FULL = Bounds()
# for a machine on which other tests run
BUSY = Bounds(5.0, 5.0, 400.0, 200.0, 1024.0, 60.0, patience_s=20.0, settle_s=20.0)
QUICK = (
    "15 MB of prose to /tokenize",
    "20,000 tools",
    "8 x 64 stops of 512, n = 32",
    "350,000 messages",
    "n = 128, echo, logprobs 20",
    "4 ladders of alternatives, left",
    "schemas that repeat their parts, GLM",
    "64 clients that end their sending",
    "ambiguous grammars, n = 8",
)


@dataclass
class Record:
    """Results of one repeat, with None for what it did not reach.

    Attributes:
        case: name of the kind.
        answers: how many of the hostile requests got which status.
        health_s, gap_s: longest answer of /health, longest gap of the stream.
        alone_s: longest gap before the attack.
        growth_mib, left_mib: memory beyond that before at most, and once it has settled.
        log_kib: growth of the log.
        drain_s: from SIGTERM to the end of the process.
        status: of the process.
        faults: what else was wrong, such as a probe or a stream that failed.
    """

    case: str
    answers: dict[str, int] = field(default_factory=dict)
    health_s: float | None = None
    gap_s: float | None = None
    alone_s: float | None = None
    growth_mib: float | None = None
    left_mib: float | None = None
    log_kib: float | None = None
    drain_s: float | None = None
    status: int | None = None
    faults: list[str] = field(default_factory=list)

    def broken(self, bounds: Bounds) -> list[str]:
        """Return the figures that are out of bounds, a phrase each."""
        found = [f"{fault:.200}" for fault in self.faults[:3]]
        for name in ("health_s", "gap_s", "growth_mib", "left_mib", "log_kib", "drain_s"):
            value, most = getattr(self, name), getattr(bounds, name)
            if value is None or value > most:
                shown = "missing" if value is None else f"{value:.2f}"
                found.append(f"{name} is {shown}, at most {most:g}")
        if self.status != 0:
            found.append(f"the process ended with status {self.status}")
        return found


async def besiege(record: Record, server: Server, facts: Facts, bounds: Bounds) -> None:
    """Let one kind of request at a running server, which has ended afterwards."""
    port = urlsplit(server.url).port
    assert port is not None
    patience_s = bounds.patience_s * CASES[record.case].patience
    case = {"case": record.case, "facts": asdict(facts), "patience_s": patience_s}
    with Worker("tests.soak.attacker:Attacker", port=port, **case) as attacker:
        attacker.call(op="ready")
        body = STREAM | {"max_tokens": facts.max_model_len - PROMPT_ROOM}
        async with Watch(server.url, server.process.pid, body) as watch:
            has_begun = await watch.until(lambda: watch.tokens.begin is not None, FIRST_WITHIN_S)
            assert has_begun, "no first token"
            await _attack(record, attacker, watch, server, bounds)
        # a server that reads slowly gets the signal before it has read all
        await asyncio.to_thread(attacker.call, op="start")
        await asyncio.sleep(IN_WORK_S)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            limit = bounds.drain_s + EXIT_MARGIN_S
            record.status = await asyncio.to_thread(server.process.wait, limit)
            record.drain_s = time.monotonic() - begin
            if not await watch.until(lambda: not watch.memory.resident(), AFTERWARDS_S):
                record.faults.append("a process is left after the server's end")


async def _attack(
    record: Record, attacker: Worker, watch: Watch, server: Server, bounds: Bounds
) -> None:
    """The requests, and what the watch has seen of them."""
    begin = time.monotonic()
    await asyncio.sleep(ALONE_S)
    record.alone_s = watch.tokens.longest_s(begin)
    memory, log = watch.memory, server.log.stat().st_size
    before, planned = memory.resident(), memory.planned()
    memory.peak, begin = 0, time.monotonic()

    def growth_mib(resident: int) -> float:
        return (resident - memory.planned() - before + planned) / MIB

    await asyncio.to_thread(attacker.call, op="start")
    record.answers = await asyncio.to_thread(attacker.call, op="result")
    await asyncio.sleep(AFTERWARDS_S)
    record.health_s = watch.probes.longest_s(begin)
    record.gap_s = watch.tokens.longest_s(begin)
    record.growth_mib = growth_mib(memory.peak)
    record.log_kib = (server.log.stat().st_size - log) / 1024
    record.faults += watch.faults
    if not watch.probes.has_stalled(FROZEN_S):
        await watch.until(lambda: growth_mib(memory.resident()) <= bounds.left_mib, bounds.settle_s)
    record.left_mib = growth_mib(memory.resident())


def run_case(case: str, folder: Path, facts: Facts, bounds: Bounds, *flags: str) -> Record:
    """Start a server in `folder` and besiege it; every process has ended afterwards.

    Args:
        case: a name of `CASES`.
        folder: for the log.
        facts: of the model.
        bounds: whose patience counts.
        flags: of the server, beside the default ones.
    """
    record = Record(case)
    try:
        kind = CASES[case]
        with serving(folder, *flags, *kind.flags, open_files=kind.open_files) as server:
            asyncio.run(besiege(record, server, facts, bounds))
    except (AssertionError, RuntimeError) as error:
        # the other kinds are still worth their time
        record.faults.append(repr(error))
    return record


def _most(records: Sequence[Record], name: str, digits: int) -> str:
    """The worst of the repeats; one without a figure is the worst."""
    values = [getattr(record, name) for record in records]
    return "none" if None in values else f"{max(values):.{digits}f}"


def rows_of(records: Sequence[Record]) -> list[dict[str, str]]:
    """Cells of a table of records by their heads, the worst of the repeats of each kind."""
    rows = []
    for case in dict.fromkeys(record.case for record in records):
        repeats = [record for record in records if record.case == case]
        answers = sum((Counter(record.answers) for record in repeats), Counter[str]())
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(answers.items()))
        gap = f"{_most(repeats, 'gap_s', 2)} ({_most(repeats, 'alone_s', 2)})"
        growth = [_most(repeats, name, 0) for name in ("growth_mib", "left_mib", "log_kib")]
        health, drain = _most(repeats, "health_s", 2), _most(repeats, "drain_s", 1)
        rows.append(dict(zip(HEAD, (case, counts, health, gap, *growth, drain), strict=True)))
    return rows


def lines_of(records: Sequence[Record]) -> list[str]:
    """The table of records in Markdown."""
    rows = [list(row.values()) for row in rows_of(records)]
    return list(map(table_row, [HEAD, ["---"] * len(HEAD), *rows]))


def siege(names: Sequence[str], repeats: int, is_large: bool, bounds: Bounds) -> list[Record]:
    """All repeats of these kinds, a line each."""
    records = []
    facts = LARGE if is_large else DEMO
    with tempfile.TemporaryDirectory() as folder:
        flags = [str(large_model.write_model(Path(folder) / "large"))] if is_large else []
        for name in names:
            for _ in range(repeats):
                record = run_case(name, Path(folder), facts, bounds, *flags)
                records.append(record)
                marks = "; ".join(record.broken(bounds)) or "within bounds"
                print(f"{lines_of([record])[-1]} {marks}", flush=True)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and print a table; 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few kinds, once, wide bounds")
    parser.add_argument(
        "--case",
        action="append",
        metavar="TEXT",
        help="only kinds whose name begins with this; may be given several times",
    )
    parser.add_argument("--repeats", type=int, help="default: 3, quick: 1")
    parser.add_argument("--large", action="store_true", help="a large vocabulary, a long context")
    parser.add_argument(
        "--out", type=Path, help="JSON of the table, as benchmarks/results/soak/siege_demo.json"
    )
    args = parser.parse_args(argv)
    bounds = BUSY if args.quick else FULL
    kinds, starts = QUICK if args.quick else tuple(CASES), tuple(args.case or [""])
    names = [name for name in kinds if name.startswith(starts)]
    if not names:
        parser.error(f"--case: no kind begins with {args.case}; there are {', '.join(kinds)}")
    # an end that is asked for goes through the blocks that end the processes
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    repeats = args.repeats or (1 if args.quick else 3)
    records = siege(names, repeats, args.large, bounds)
    env = environment()
    where = ", ".join(f"{key} {env[key]}" for key in ("cpu", "cpus", "python", "commit"))
    print("\n".join(["", f"{where}; the worst of {repeats}", "", *lines_of(records)]))
    if args.out is not None:
        result = {"name": args.out.stem, "env": env, "tier": "T0", "repeats": repeats}
        write_json(args.out, result | {"rows": rows_of(records)})
    broken = {record.case for record in records if record.broken(bounds)}
    print(f"\n{len(broken)} of {len(names)} kinds out of bounds")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
