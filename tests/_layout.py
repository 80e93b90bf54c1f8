"""The rules of the source tree, checked on its syntax trees; nothing is imported.

Each rule is a function from a parsed package to lines `file:line: what is wrong`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "fd_dsa"
# from low to high: a room imports itself and the rooms before it, never one after it
ROOMS = (
    "errors",
    "environment",
    "commands",
    "signals",
    "processes",
    "cancellation",
    "speculative_config",
    "cache_formats",
    "capture_sizes",
    "config",
    "command_line",
    "custom_ops",
    "tensor",
    "triton_runtime",
    "device",
    "step",
    "ops",
    "distributed",
    "attention",
    "models",
    "runner",
    "v4_prepare",
    "v4_attention",
    "fastdeploy_plugin",
    "chat",
    "grammars",
    "engine",
    "startup",
    "offline",
    "serve",
    "client",
    "accuracy",
    "doctor",
    "cli",
)
# outside package (or part of one) -> the rooms which may import it
ONLY_IN = {
    "fastdeploy": ("fastdeploy_plugin",),
    "triton.backends": ("triton_runtime",),
    "triton.compiler": ("triton_runtime",),
    "triton.runtime": ("triton_runtime",),
    "triton._C": ("triton_runtime",),
    "lm_eval": ("accuracy",),
    "nltk": ("accuracy",),
    "langdetect": ("accuracy",),
    "scipy": ("accuracy",),
    "llguidance": ("grammars",),
    "matplotlib": (),
    "torch": (),
    "transformers": (),
}
ENVIRONMENT = ("environ", "environb", "getenv", "putenv", "unsetenv")
# rooms whose interfaces are typed, so that an attribute is there or is an error of the type checker
TYPED_ROOMS = ("attention", "runner")
PROBES = ("getattr", "hasattr")
# decorators of functions in Triton's language, whose parameters have no types of Python
KERNEL_DECORATORS = ("triton.jit", "step_kernel", "paddle_jit")
# share of the package's parameters whose annotation names Any; lower it when it falls
MAX_ANY_SHARE = 0.025
MAX_LINES = 400
LONG_FILE_MARK = "long on purpose: "
CUDA_SOURCES = "custom_ops/csrc", "tests/custom_ops/emulated"


@dataclass(frozen=True)
class Import:
    """Imported name.

    Attributes:
        line: line of the import.
        target: dotted name that it reaches.
    """

    line: int
    target: str


@dataclass(frozen=True)
class Module:
    """One parsed file of the package."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """First part of the name below the package; entry points count as the highest room."""
        parts = self.name.split(".")
        if parts[-1] == "__main__":
            return ROOMS[-1]
        return parts[1] if len(parts) > 1 else ""

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree."""
        return list(ast.walk(self.tree))

    @cached_property
    def imports(self) -> list[Import]:
        """Every import in the file, also inside functions and below `if TYPE_CHECKING:`."""
        return list(_imports_of(self))


def load_package(root: Path) -> dict[str, Module]:
    """All modules of `root/fd_dsa` by dotted name."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path, ast.parse(path.read_text("utf-8"), str(path)))
    assert modules, f"no module in {root / PACKAGE}"
    return modules


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The dotted module of a `from … import`, relative ones resolved."""
    if not node.level:
        return node.module or ""
    is_package = module.path.name == "__init__.py"
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imports_of(module: Module) -> Iterator[Import]:
    """See `Module.imports`."""
    for node in module.nodes:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, node)
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(node.lineno, target)


def _resolve(target: str, modules: dict[str, Module]) -> str | None:
    """The module of the package that an import reaches, None for one outside."""
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in modules:
            return name
    return None


def unknown_rooms(modules: dict[str, Module]) -> Iterator[str]:
    """Rooms that have no place in `ROOMS`."""
    for module in modules.values():
        if module.room and module.room not in ROOMS:
            yield f"{module.path}:1: room {module.room!r} has no place in ROOMS"


def wrong_directions(modules: dict[str, Module]) -> Iterator[str]:
    """Imports of a higher room."""
    rank = {room: index for index, room in enumerate(("", *ROOMS))}
    for module in modules.values():
        for found in module.imports:
            reached = _resolve(found.target, modules)
            if reached is None:
                continue
            other = modules[reached].room
            if rank.get(other, -1) > rank.get(module.room, len(ROOMS)):
                yield f"{module.path}:{found.line}: {module.name} imports {reached}, a higher room"


def cycles(modules: dict[str, Module]) -> Iterator[str]:
    """Groups of modules which import each other."""
    graph = {
        name: {
            reached
            for found in module.imports
            if (reached := _resolve(found.target, modules)) not in (None, name)
        }
        for name, module in modules.items()
    }
    for name in graph:
        path = _path_back(graph, name)
        if path and name == min(path):
            yield f"{modules[name].path}:1: cycle {' -> '.join([*path, name])}"


def _path_back(graph: dict[str, set[str]], start: str) -> list[str]:
    """A shortest path from `start` to itself, without its end; empty where there is none."""
    before: dict[str, str] = {}
    queue = [start]
    for name in queue:
        for reached in sorted(graph[name]):
            if reached == start:
                path = [name]
                while path[0] != start:
                    path.insert(0, before[path[0]])
                return path
            if reached not in before:
                before[reached] = name
                queue.append(reached)
    return []


def forbidden_imports(modules: dict[str, Module]) -> Iterator[str]:
    """Packages that only one room may import, and those that none may."""
    for module in modules.values():
        for found in module.imports:
            for outside, rooms in ONLY_IN.items():
                inside = found.target == outside or found.target.startswith(outside + ".")
                if inside and module.room not in rooms:
                    where = f"only {', '.join(rooms)} may" if rooms else "no room may"
                    yield f"{module.path}:{found.line}: imports {found.target}; {where}"


def environment_reads(modules: dict[str, Module]) -> Iterator[str]:
    """Uses of the process environment outside `environment`."""
    for module in modules.values():
        if module.room == "environment":
            continue
        for node in module.nodes:
            named = isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT
            taken = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and any(alias.name in ENVIRONMENT for alias in node.names)
            )
            if named or taken:
                yield f"{module.path}:{node.lineno}: reads the environment; only environment may"


def probes(modules: dict[str, Module]) -> Iterator[str]:
    """Calls that look an attribute of another object up by its name, in rooms with typed seams."""
    for module in modules.values():
        for node in module.nodes if module.room in TYPED_ROOMS else ():
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in PROBES:
                continue
            if ast.unparse(node.args[0]) != "self":
                name = ast.unparse(node.func)
                yield f"{module.path}:{node.lineno}: {name} of another object; give it a type"


def long_files(paths: Iterable[Path]) -> Iterator[str]:
    """Files over their limit whose first line gives no reason."""
    for path in paths:
        lines = path.read_text("utf-8").splitlines()
        if len(lines) > MAX_LINES and LONG_FILE_MARK not in lines[0]:
            yield f"{path}:1: {len(lines)} lines, allowed {MAX_LINES}; split it"


def _functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods of a module, kernels left out."""
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = [ast.unparse(one).partition("(")[0] for one in node.decorator_list]
            if not any(one in KERNEL_DECORATORS for one in decorators):
                yield node


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """Parameters of a function but `self` and `cls`."""
    args = function.args
    found = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    found += [one for one in (args.vararg, args.kwarg) if one is not None]
    return [one for one in found if one.arg not in ("self", "cls")]


def missing_annotations(modules: dict[str, Module]) -> Iterator[str]:
    """Functions without all annotations, which mypy lets pass if their file has kernels."""
    for module in modules.values():
        for function in _functions(module):
            types = [function.returns, *(one.annotation for one in _parameters(function))]
            if None in types:
                yield f"{module.path}:{function.lineno}: {function.name} lacks an annotation"


def any_share(modules: dict[str, Module]) -> Iterator[str]:
    """Share of parameters of type Any, if it is over the limit."""
    num_all = num_any = 0
    for module in modules.values():
        for node in module.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                types = [ast.unparse(p.annotation) for p in _parameters(node) if p.annotation]
                num_all += len(_parameters(node))
                num_any += sum("Any" in re.findall(r"\w+", one) for one in types)
    if num_any > MAX_ANY_SHARE * num_all:
        share = f"{num_any} of {num_all} parameters have Any in their type"
        yield f"{PACKAGE}:1: {share}, allowed are {MAX_ANY_SHARE:.1%}; name a type, or object"


def violations(root: Path) -> list[str]:
    """All that is wrong in the tree below `root`, one line each."""
    modules = load_package(root)
    folders = (PACKAGE, "tests", "tools", "benchmarks")
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    files += [path for folder in CUDA_SOURCES for path in sorted((root / folder).glob("*.cu*"))]
    rules = (
        unknown_rooms,
        wrong_directions,
        cycles,
        forbidden_imports,
        environment_reads,
        probes,
        missing_annotations,
        any_share,
    )
    found = [line for rule in rules for line in rule(modules)]
    return found + list(long_files(files))
