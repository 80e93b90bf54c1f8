"""Uses of the package's private names in its tests, found on their syntax trees.

A test that reaches into an object breaks with every change of its inside, although the behaviour
stays. So tests import, read, replace and override public names only. A private name begins with one
underscore. It may be used in the file whose classes define it, because a test's own double has an
inside too. Names that no file of the package defines belong to other libraries.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "fd_dsa"
# the double of FastDeploy has the private names that the plug-in finds there; the other file has
# examples of uses
SKIPPED = ("fakes", "test_privates.py")
PRIVATE = re.compile(r"_[A-Za-z]\w*")
# in a dotted path, or in the text of a program
IN_TEXT = re.compile(r"(?<=[\w)\]])\.(_[A-Za-z]\w*)")
# methods of texts, and functions whose second argument is the name of an attribute
OF_TEXTS = frozenset({"endswith", "removeprefix", "removesuffix", "replace", "startswith"})
BY_NAME = frozenset({"delattr", "getattr", "hasattr", "object", "setattr"})
# methods and fields that `namedtuple` makes public in spite of their names
OF_NAMED_TUPLES = frozenset({"_asdict", "_field_defaults", "_fields", "_make", "_replace"})
DEFINITION = re.compile(
    r"\b(?:def|class)\s+(_[A-Za-z]\w*)"
    r"|\b(?:self|cls)\.(_[A-Za-z]\w*)"
    r"|^[ \t]*(_[A-Za-z]\w*)[ \t]*(?:=(?!=)|:|,)",
    re.MULTILINE,
)


class Use(NamedTuple):
    """Use of a private name.

    Attributes:
        path: of the file, below `tests/`.
        line: of the use, from 1.
        kind: "import", "attribute", "string" or "override".
        name: the private name; of an import the whole dotted path.
    """

    path: str
    line: int
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tests/{self.path}:{self.line}: {self.kind} of the private name {self.name}"


def private_uses(root: Path) -> list[Use]:
    """List all uses below `root/tests` of names that are private to `root/fd_dsa`."""
    defined = _defined_in(root / PACKAGE)
    found = []
    for path in sorted((root / "tests").rglob("*.py")):
        relative = path.relative_to(root / "tests")
        if relative.parts[0] not in SKIPPED:
            tree = ast.parse(path.read_text("utf-8"), str(path))
            found += sorted(_uses_in(relative.as_posix(), tree, defined))
    return found


def _defined_in(package: Path) -> set[str]:
    """Collect the private names of the package's functions, classes, attributes and variables."""
    paths = sorted(package.rglob("*.py"))
    assert paths, f"no module in {package}"
    found = {path.stem for path in paths if PRIVATE.fullmatch(path.stem)}
    for path in paths:
        for groups in DEFINITION.findall(path.read_text("utf-8")):
            found.update(filter(None, groups))
    return found - OF_NAMED_TUPLES


def _uses_in(path: str, tree: ast.Module, defined: set[str]) -> Iterator[Use]:
    """Find the uses in one file."""
    nodes = list(ast.walk(tree))
    own = set(_members(nodes))
    imported = _imported_names(nodes)
    names = set(_attribute_names(nodes))
    # a name that a test computes may come from any of its texts
    is_computed = any(not isinstance(node, ast.Constant) for node in names)
    parts = set(_parts_of_text(nodes))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in _targets(node):
                if any(PRIVATE.fullmatch(part) for part in target.split(".")):
                    yield Use(path, node.lineno, "import", target)
        elif isinstance(node, ast.Attribute):
            if node.attr in defined and (node.attr not in own or _is_super(node.value)):
                yield Use(path, node.lineno, "attribute", node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            for name in _names_in_text(node.value, is_computed or node in names):
                if name in defined and name not in own:
                    yield Use(path, node.lineno, "string", name)
        elif isinstance(node, ast.ClassDef) and _bases(node) & imported:
            for line, name in _defined_by(node):
                if name in defined:
                    yield Use(path, line, "override", name)


def _attribute_names(nodes: list[ast.AST]) -> Iterator[ast.expr]:
    """Find the arguments that name an attribute, as in `getattr(owner, name)`."""
    for node in nodes:
        if isinstance(node, ast.Call) and _called(node) in BY_NAME:
            yield from node.args[1:2]


def _called(node: ast.Call) -> str:
    """Return the last part of the name of a called function, "" if it has none."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _parts_of_text(nodes: list[ast.AST]) -> Iterator[ast.expr]:
    """Find docstrings, pieces of f-strings and the arguments of methods such as `endswith`."""
    for node in nodes:
        if isinstance(node, ast.Expr):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield from node.values
        elif isinstance(node, ast.Call) and _called(node) in OF_TEXTS:
            yield from node.args


def _names_in_text(text: str, is_name: bool) -> list[str]:
    """List the private names in a text, which may be one as a whole."""
    return [text] if is_name and PRIVATE.fullmatch(text) else IN_TEXT.findall(text)


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Give the dotted paths that an import of the package names."""
    if isinstance(node, ast.Import):
        paths = [alias.name for alias in node.names]
    elif node.level:
        paths = []
    else:
        paths = [f"{node.module}.{alias.name}" for alias in node.names]
    yield from (path for path in paths if path.split(".")[0] == PACKAGE)


def _imported_names(nodes: list[ast.AST]) -> set[str]:
    """Collect the local names of all classes and modules imported from the package."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
        for alias in node.names
    }


def _bases(node: ast.ClassDef) -> set[str]:
    """Give the first part of each base's dotted name."""
    return {ast.unparse(base).split(".")[0].split("[")[0] for base in node.bases}


def _defined_by(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """Give line and name of the methods and variables in the body of a class."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield inner.lineno, inner.name
        targets = inner.targets if isinstance(inner, ast.Assign) else []
        if isinstance(inner, ast.AnnAssign):
            targets = [inner.target]
        yield from ((inner.lineno, one.id) for one in targets if isinstance(one, ast.Name))


def _members(nodes: list[ast.AST]) -> Iterator[str]:
    """Find the names that the file's own classes and namespaces define."""
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            yield from (name for _, name in _defined_by(node))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Call) and _called(node) == "SimpleNamespace":
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)


def _is_super(node: ast.expr) -> bool:
    """Tell if an expression is `super()`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "super"
