"""One place of a function rewritten by a rule: ``X < lengths[Y] => X <= lengths[Y]``.

Code is found by its syntax tree, wherever it stands in its function and however its lines are broken. ``X``, ``Y`` and
``Z`` match any expression, the same letter the same one. Both sides are expressions, or both are statements:
``a = X; b = Y => b = Y; a = X``, or ``x.zero_() => pass``. ``name=X`` is also an argument of a call. An operator alone
on the right takes the place of the expression's own: ``X < lengths[Y] => <=``.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence

HOLES = ("X", "Y", "Z")
MODULE = "<module>"  # in place of a function's name: code of the module itself
OPERATORS = frozenset("+-*/%<>=!&|^")


def rewritten(text: str, function: str, rule: str) -> str:
    """A module's ``text`` in which one place of ``function`` (a qualified name) follows ``rule``.

    All else stays as it is, comments and lines too: Triton and torch.compile read a function's source from its file.

    Raises:
        ValueError: the rule has no two sides, or ``function`` or the place is not there exactly once.
    """
    before, arrow, after = rule.partition(" => ")
    if not arrow:
        raise ValueError(f"{rule!r} is no rule; expected 'before => after'")
    old, new = _sides(before, after)
    tree = ast.parse(text)
    scopes = [tree] if function == MODULE else [node for name, node in _definitions(tree) if name == function]
    places = [place for scope in scopes for place in _places(scope, old)]
    if len(scopes) != 1 or len(places) != 1:
        raise ValueError(f"{before!r} is {len(places)} times in {len(scopes)} functions {function}; expected one place")
    nodes, found = places[0]
    lines = text.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: nodes[0].lineno - 1])) + nodes[0].col_offset
    end = sum(map(len, lines[: nodes[-1].end_lineno - 1])) + nodes[-1].end_col_offset
    code = "\n".join(ast.unparse(_Filled(found).visit(node)) for node in new)
    after = f"({code})" if isinstance(new[0], ast.expr) else code.replace("\n", "\n" + " " * nodes[0].col_offset)
    return (text.encode()[:start] + after.encode() + text.encode()[end:]).decode()


def _sides(before: str, after: str) -> tuple[Sequence[ast.AST], Sequence[ast.AST]]:
    """Both as statements, or each as one expression."""
    old = ast.parse(before).body
    if OPERATORS.issuperset(after):
        new, other = copy.deepcopy(old), ast.parse(f"X {after} Y", mode="eval").body
        vars(new[0].value).update({name: value for name, value in vars(other).items() if name in ("op", "ops")})
    else:
        new = ast.parse(after).body
    if all(len(side) == 1 and isinstance(side[0], ast.Expr) for side in (old, new)):
        return [old[0].value], [new[0].value]
    return old, new


def _definitions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes, with their qualified names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield within + node.name, node
            yield from _definitions(node, f"{within}{node.name}.")
        else:
            yield from _definitions(node, within)


def _places(scope: ast.AST, old: Sequence[ast.AST]) -> Iterator[tuple[Sequence[ast.AST], dict[str, ast.AST]]]:
    """Where ``old`` is, and what its holes stand for there."""
    for node in ast.walk(scope):
        for _, value in ast.iter_fields(node):
            nodes = value if isinstance(value, list) else [value]
            for i in range(len(nodes) - len(old) + 1):
                found: dict[str, ast.AST] = {}
                if _matches(old, nodes[i : i + len(old)], found):
                    yield nodes[i : i + len(old)], found


def _matches(old: object, node: object, found: dict[str, ast.AST]) -> bool:
    if isinstance(old, ast.Name) and old.id in HOLES:
        return isinstance(node, ast.expr) and ast.dump(found.setdefault(old.id, node)) == ast.dump(node)
    if isinstance(old, ast.Assign) and isinstance(node, ast.keyword):
        return ast.unparse(old.targets[0]) == node.arg and _matches(old.value, node.value, found)
    if isinstance(old, list) and isinstance(node, list):
        return len(old) == len(node) and all(_matches(*pair, found) for pair in zip(old, node, strict=True))
    if isinstance(old, ast.AST) and type(old) is type(node):
        fields = [name for name in old._fields if name not in ("ctx", "kind", "type_comment")]
        return all(_matches(getattr(old, name, None), getattr(node, name, None), found) for name in fields)
    return type(old) is type(node) and old == node


class _Filled(ast.NodeTransformer):
    """With what was found in place of its holes."""

    def __init__(self, found: dict[str, ast.AST]) -> None:
        self.found = found

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.found.get(node.id, node)
