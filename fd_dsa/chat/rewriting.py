"""Rewrites syntax trees of templates so that each operation counts for the budget.

An operator becomes a filter that no template can name. Each loop, macro, call block and block
begins with a step.
"""

from __future__ import annotations

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.visitor import NodeTransformer

# bytes that one evaluation of a node makes, in addition to counted values
_OUTPUT_BYTES, _ITEM_BYTES, _PAIR_BYTES = 8, 64, 128
_STEP_BYTES = 32
_OPERATORS = (nodes.Add, nodes.Sub, nodes.Mul, nodes.FloorDiv, nodes.Pow, nodes.Mod)
_SMALL = (nodes.Compare, nodes.Not, nodes.Test, nodes.Neg, nodes.Pos)
_REPEATED = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


def rewrite(template: nodes.Template, environment: Environment) -> nodes.Template:
    """Rewrite the tree of a template in place."""
    _Rewriter().visit(template)
    template.set_environment(environment)
    return template


class _Rewriter(NodeTransformer):
    """Rewrites nodes whose children are rewritten already."""

    def generic_visit(self, node: nodes.Node, *args: object, **kwargs: object) -> nodes.Node:
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, _REPEATED):
            size = _STEP_BYTES + sum(map(_made_bytes, node.body))
            step = _filtered(nodes.Const(size, lineno=node.lineno), "(tick)")
            node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For) and isinstance(node.test, nodes.Expr):
            node.test = _filtered(node.test, "(ticked)", nodes.Const(_STEP_BYTES))
        if isinstance(node, nodes.Compare):
            _rewrite_compare(node)
        elif isinstance(node, nodes.Pair):
            node.key = _checked(node.key, "(key)")
        elif isinstance(node, nodes.Getitem):
            return _rewrite_getitem(node)
        elif isinstance(node, nodes.Concat):
            first, *others = node.nodes
            return _filtered(first, "~", *others)
        elif isinstance(node, _OPERATORS):
            return _rewrite_operator(node)
        elif isinstance(node, nodes.Neg) and not _is_small(node.node):
            return _filtered(node.node, "(-)")
        elif isinstance(node, nodes.EvalContextModifier):
            raise TemplateSyntaxError(
                "'autoescape' does not exist; a prompt is plain text", node.lineno
            )
        return node


def _rewrite_operator(node: nodes.BinExpr) -> nodes.Filter:
    left = node.left
    if isinstance(node, nodes.Add) and isinstance(left, nodes.Filter) and left.name == "+":
        # join a chain of texts at once
        left.args.append(node.right)
        return left
    return _filtered(left, node.operator, node.right)


def _rewrite_compare(node: nodes.Compare) -> None:
    operands = [node.expr, *(operation.expr for operation in node.ops)]
    # comparing with a small value takes time in proportion to the other value, so it is unchecked
    if sum(not _is_small(operand) for operand in operands) > 1:
        node.expr = _checked(node.expr, "(compared)")
        for operation in node.ops:
            operation.expr = _checked(operation.expr, "(compared)")


def _rewrite_getitem(node: nodes.Getitem) -> nodes.Expr:
    if not isinstance(node.arg, nodes.Slice):
        node.arg = _checked(node.arg, "(key)")
        return node
    bounds = (node.arg.start, node.arg.stop, node.arg.step)
    return _filtered(node.node, "[:]", *(bound or nodes.Const(None) for bound in bounds))


def _checked(node: nodes.Expr, name: str) -> nodes.Expr:
    return node if _is_small(node) else _filtered(node, name)


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _is_small(node: nodes.Expr) -> bool:
    """Return True for a number, a text of the template, or an empty list."""
    if isinstance(node, nodes.Const):
        return True
    if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict):
        return not node.items
    if isinstance(node, nodes.Filter):
        has_number = any(_is_number(value) for value in (node.node, *node.args))
        return node.name in ("length", "count") or (node.name in ("+", "-") and has_number)
    return isinstance(node, _SMALL)


def _is_number(node: nodes.Expr | None) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, int | float)


def _made_bytes(node: nodes.Node) -> int:
    """Return the bytes made by one evaluation, without nested loops, macros and blocks."""
    if isinstance(node, _REPEATED):
        return 0
    size = 0
    if isinstance(node, nodes.Output):
        size = _OUTPUT_BYTES * len(node.nodes)
    elif isinstance(node, nodes.List | nodes.Tuple):
        size = _ITEM_BYTES * (1 + len(node.items))
    elif isinstance(node, nodes.Dict):
        size = _PAIR_BYTES * (1 + len(node.items))
    return size + sum(map(_made_bytes, node.iter_child_nodes()))
