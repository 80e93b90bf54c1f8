"""Mutation test: small faults are put into the package, and the tests have to notice them.

    python -m tests.mutants --seed 24 --count 150                      # hours on 2 cores
    python -m tests.mutants --seed 24 --count 150 --baseline CHECKOUT  # compared with an older tree

A mutant changes one operator, constant, condition, return value or call. Mutants are drawn with a
fixed seed from lines that are in this tree and in the baseline alike, so that both suites can be
asked about the same fault. A suite runs once in a copy of the tree whose drawn lines report the
test that reaches them, in child processes too. Each mutant then meets the nearest --most test
files that reach it: the quick ones, then the slow ones, and what both miss the baseline's, of which
the rooms' own tests are recorded.

Writes the verdicts as they come to --out; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

ROOMS = (
    "command_line",
    "device",
    "engine",
    "offline",
    "ops",
    "processes",
    "runner",
    "serve",
    "startup",
    "step",
)
TREE = Path(__file__).resolve().parents[1]
# a module of the recorded copy: `hit` adds the number of a mutant and the file of the running test
# to a list, each pair once a process; one write, so that processes may append at the same time
REPORTER = """
import os
LIST = os.path.join(os.path.dirname(os.path.dirname(__file__)), "hits.txt")
SEEN = set()
def hit(number):
    line = f"{number} {os.environ.get('PYTEST_CURRENT_TEST', '').split('::')[0]}\\n"
    if line not in SEEN:
        SEEN.add(line)
        file = os.open(LIST, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, line.encode())
        os.close(file)
"""
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One changed line: `line` counts from 1; `kernel` marks code that Triton compiles."""

    path: str
    line: int
    before: str
    after: str
    kernel: bool

    def __str__(self) -> str:
        return f"{self.path}  {self.before.strip()}  ->  {self.after.strip()}"


def mutated(node: ast.AST) -> ast.AST | None:
    """A copy of a node with one fault in it, None where none is known."""
    fault: Any = copy.deepcopy(node)
    if isinstance(fault, ast.Compare) and len(fault.ops) == 1:
        fault.ops = [SWAPPED[type(fault.ops[0])]()]
    elif isinstance(fault, ast.BinOp | ast.BoolOp) and type(fault.op) in SWAPPED:
        fault.op = SWAPPED[type(fault.op)]()
    elif isinstance(fault, ast.UnaryOp) and isinstance(fault.op, ast.Not):
        fault = fault.operand
    elif isinstance(fault, ast.Constant) and isinstance(fault.value, bool):
        fault.value = not fault.value
    elif isinstance(fault, ast.Constant) and type(fault.value) is int:
        fault.value += 1
    elif isinstance(fault, ast.Return) and fault.value is not None:
        fault.value = ast.Constant(None)
    elif isinstance(fault, ast.Expr) and isinstance(fault.value, ast.Call):
        fault = ast.Pass()
    else:
        return None
    return fault


def in_functions(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.FunctionDef]]:
    """Every statement and expression that runs inside a function, with that function."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                for node in ast.walk(statement):
                    yield node, function


def mutants_of(path: Path, text: str) -> list[Mutant]:
    """All mutants of one file whose change stays on one line, each node once."""
    lines = text.splitlines()
    tree = ast.parse(text)
    messages = {id(n) for r in ast.walk(tree) if isinstance(r, ast.Raise) for n in ast.walk(r)}
    made: dict[tuple[int, int, str], Mutant] = {}
    for node, function in in_functions(tree):
        line = getattr(node, "lineno", None)
        if line is None or node.end_lineno != line or id(node) in messages:
            continue
        fault = mutated(node)
        # columns count bytes, which differ from characters outside of ASCII
        if fault is None or not lines[line - 1].isascii():
            continue
        before = lines[line - 1]
        source = ast.unparse(fault)
        if isinstance(node, ast.expr):
            source = f"({source})"
        after = before[: node.col_offset] + source + before[node.end_col_offset :]
        kernel = any("jit" in ast.unparse(d) for d in function.decorator_list)
        key = (line, node.col_offset, type(node).__name__)
        made[key] = Mutant(str(path), line, before, after, kernel)
    return list(made.values())


def is_python(tree: Path, mutant: Mutant) -> bool:
    """Tell if a file of the tree with the mutant in it can be parsed."""
    lines = (tree / mutant.path).read_text().splitlines()
    lines[mutant.line - 1] = mutant.after
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def lines_of(tree: Path) -> Counter[str]:
    """Count each line of a tree's package, without its indentation."""
    files = (tree / "fd_dsa").rglob("*.py")
    return Counter(line.strip() for file in files for line in file.read_text().split("\n"))


def draw(tree: Path, baseline: Path, seed: int, count: int) -> list[Mutant]:
    """As many from each room, of lines that are once in either tree's package.

    Those whose text has the smallest hash: a change elsewhere in the tree draws the same ones.
    """

    def rank(mutant: Mutant) -> str:
        change = f"{seed} {mutant.before.strip()} {mutant.after.strip()}"
        return hashlib.sha256(change.encode()).hexdigest()

    of_tree, of_baseline = lines_of(tree), lines_of(baseline)
    drawn = []
    for index, room in enumerate(ROOMS):
        candidates = [
            mutant
            for path in sorted((tree / "fd_dsa" / room).rglob("*.py"))
            for mutant in mutants_of(path.relative_to(tree), path.read_text())
            if of_tree[mutant.before.strip()] == of_baseline[mutant.before.strip()] == 1
        ]
        share = count // len(ROOMS) + (index < count % len(ROOMS))
        valid = (one for one in sorted(candidates, key=rank) if is_python(tree, one))
        drawn += itertools.islice(valid, share)
    return drawn


def place_in(tree: Path, mutant: Mutant) -> tuple[Path, int]:
    """File and line, from 0, of a mutant in another tree, where its line may have moved."""
    for path in [tree / mutant.path, *sorted((tree / "fd_dsa").rglob("*.py"))]:
        lines = path.read_text().split("\n") if path.exists() else []
        numbers = [i for i, line in enumerate(lines) if line.strip() == mutant.before.strip()]
        if len(numbers) == 1:
            return path, numbers[0]
    raise LookupError(f"{tree} has no line {mutant.before.strip()!r}")


def indented_as(line: str, model: str) -> str:
    """`line` with the indentation of `model`."""
    return model[: len(model) - len(model.lstrip())] + line.strip()


def copy_of(tree: Path, target: Path) -> Path:
    """The tracked files of a checkout in a fresh folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=tree, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    for name in filter(None, names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tree / name, target / name)
    return target


def run_tests(tree: Path, tests: list[str], *options: str, limit: int) -> int:
    """Exit status of pytest on some files of a copied tree; a run that hangs counts as failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=180"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            [*command, *options, *tests],
            cwd=tree,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limit,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


def statement_around(lines: list[str], number: int) -> tuple[int, str] | None:
    """First line, from 0, and indentation of the innermost statement on a line.

    An `elif` counts as its `if`. None in a kernel, which Triton reads as text.
    """
    tree = ast.parse("\n".join(lines))
    around = []
    for node in ast.walk(tree):
        first, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) or 0
        if not isinstance(node, ast.stmt) or not first <= number + 1 <= last:
            continue
        if any("jit" in ast.unparse(d) for d in getattr(node, "decorator_list", ())):
            return None
        if not lines[first - 1].lstrip().startswith("elif"):
            around.append(node)
    inside = max(around, key=lambda node: (node.lineno, node.col_offset))
    return inside.lineno - 1, " " * inside.col_offset


def record(
    tree: Path, mutants: list[Mutant], work: Path, suite: list[str], *options: str
) -> list[list[str]]:
    """The test files that run each mutant's line, by one run of a suite; an empty one is all."""
    recorded = copy_of(tree, work)
    (recorded / "fd_dsa" / "_hits.py").write_text(REPORTER)
    inserted: dict[Path, list[tuple[int, str]]] = {}
    for number, mutant in enumerate(mutants):
        path, line = place_in(recorded, mutant)
        statement = statement_around(path.read_text().split("\n"), line)
        if statement is not None:
            first, indent = statement
            call = f"{indent}__import__('fd_dsa._hits')._hits.hit({number})"
            inserted.setdefault(path, []).append((first, call))
    for path, calls in inserted.items():
        lines = path.read_text().split("\n")
        for first, call in sorted(calls, reverse=True):
            lines.insert(first, call)
        path.write_text("\n".join(lines))
    run_tests(recorded, suite, "-n2", "--dist=loadfile", *options, limit=3 * 3600)
    files = [str(p.relative_to(recorded)) for p in sorted((recorded / "tests").rglob("test_*.py"))]
    reached: list[set[str]] = [set() for _ in mutants]
    hits = recorded / "hits.txt"
    for hit in hits.read_text().splitlines() if hits.exists() else ():
        number, _, test = hit.partition(" ")
        if test:
            reached[int(number)].add(test)
    for mutant, tests in zip(mutants, reached, strict=True):
        if mutant.kernel:
            room = "/".join(Path(mutant.path).parts[1:2])
            tests.update(f for f in files if f.startswith((f"tests/{room}/", "tests/attention/")))
    return [by_nearness(tests, mutant) for tests, mutant in zip(reached, mutants, strict=True)]


def caught(tree: Path, mutant: Mutant, tests: list[str], *options: str) -> bool:
    """Return True if some of the tests fail with the mutant in a copied tree."""
    if not tests:
        return False
    path, number = place_in(tree, mutant)
    text = path.read_text()
    lines = text.split("\n")
    lines[number] = indented_as(mutant.after, lines[number])
    path.write_text("\n".join(lines))
    try:
        # 5: no test was selected. A crash may hang in Paddle's handler of signals until the limit
        return run_tests(tree, tests, "-x", *options, limit=900) not in (0, 5)
    finally:
        path.write_text(text)


def by_nearness(tests: set[str], mutant: Mutant) -> list[str]:
    """Test files, those of the mutant's own room and module first."""
    room, name = Path(mutant.path).parts[1], Path(mutant.path).stem
    return sorted(tests, key=lambda t: (name not in t, f"tests/{room}/" not in t, t))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=24)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--baseline", type=Path, help="a checkout whose tests are asked, too")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at the same time")
    parser.add_argument("--most", type=int, default=16, help="test files that a mutant meets")
    parser.add_argument("--work", type=Path, default=TREE / "build" / "mutants")
    parser.add_argument("--out", type=Path, default=TREE / "build" / "mutants.json")
    return parser.parse_args()


class Trial:
    """Mutants, the tests that reach them and their verdicts, kept in a file as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.baseline = args, args.baseline or TREE
        self.mutants = draw(TREE, self.baseline, args.seed, args.count)
        # stage -> "tests" and "caught" -> mutant: what was found, whatever else has changed since
        self.found = json.loads(args.out.read_text()) if args.out.exists() else {}

    def save(self) -> None:
        """Write what is known."""
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def stage(
        self, name: str, tree: Path, mutants: list[Mutant], *options: str, suite: Sequence[str] = ()
    ) -> list[Mutant]:
        """Put some mutants to the tests of a tree that `options` select; returns the survivors."""
        work = self.args.work
        found = self.found.setdefault(name, {"tests": {}, "caught": {}})
        unknown = [m for m in mutants if str(m) not in found["tests"]]
        if unknown:
            tests = record(tree, unknown, work / f"{name}-recorded", list(suite), *options)
            found["tests"] |= {str(m): files for m, files in zip(unknown, tests, strict=True)}
            self.save()
        left = [m for m in mutants if str(m) not in found["caught"]]
        copies: Queue[Path] = Queue()
        for job in range(self.args.jobs if left else 0):
            copies.put(copy_of(tree, work / f"{name}-{job}"))

        def try_one(mutant: Mutant) -> None:
            copied = copies.get()
            tests = found["tests"][str(mutant)][: self.args.most]
            try:
                noticed = caught(copied, mutant, tests, *options)
            finally:
                copies.put(copied)
            found["caught"][str(mutant)] = noticed
            self.save()
            print(f"{name}: {'caught' if noticed else 'missed'} {mutant}", flush=True)

        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(try_one, left))
        return [m for m in mutants if not found["caught"][str(m)]]


def main() -> int:
    """Quick tests, slow ones, the baseline's; 1 if the baseline's catch what this tree's miss."""
    args = arguments()
    trial = Trial(args)
    everything = trial.mutants
    missed = trial.stage("make test", TREE, everything, "-m", "not slow and not oracle")
    never = trial.stage("make test-all", TREE, missed, "-m", "slow or oracle")
    print(f"{len(everything)} mutants: {len(everything) - len(missed)} caught by make test, "
          f"{len(missed) - len(never)} by the slow tests alone, {len(never)} by none")  # fmt: skip
    if args.baseline is None:
        return 0
    suite = [f"tests/{room}" for room in (*ROOMS, "attention", "models", "parity")]
    suite = [folder for folder in suite if (args.baseline / folder).is_dir()]
    unknown = trial.stage("baseline", args.baseline, never, suite=suite)
    print(f"of these {len(never)} the baseline's tests catch {len(never) - len(unknown)}")
    return 1 if len(unknown) < len(never) else 0


if __name__ == "__main__":
    sys.exit(main())
