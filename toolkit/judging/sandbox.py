"""Jinja templates of unknown origin: what they may contain, and how much they may compute and write.

jinja2's sandbox keeps a template away from Python's internals, but not from 10 ** 10 ** 10 or a loop in a loop. So a
template has text, values, ``if``, ``for`` and a few filters and methods of text, and no arithmetic; loops are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_TEMPLATE = 100_000
MOST_ROUNDS = 100_000
# What a template writes beside the values that it is given, in characters; each value may come this often.
LONGEST_OUTPUT, MOST_COPIES = 1_000_000, 10

FILTERS = (
    *("capitalize", "count", "d", "default", "e", "escape", "first", "int", "last", "length", "lower", "string"),
    *("title", "trim", "truncate", "upper", "wordcount"),
)
METHODS = (
    *("capitalize", "count", "endswith", "find", "lower", "lstrip", "removeprefix", "removesuffix", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "title", "upper"),
)
LOOP = ("first", "index", "index0", "last", "length", "revindex", "revindex0")
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.If, nodes.CondExpr, nodes.For),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Test, nodes.Filter, nodes.Getattr),
    *(nodes.Call, nodes.Getitem, nodes.Slice, nodes.Neg, nodes.Keyword, nodes.Tuple, nodes.List),
)


class TemplateError(ValueError):
    """A template that is refused, or that does too much."""


def check_template(source: str) -> set[str]:
    """The names of the values that a template uses.

    Raises TemplateError where it has something that no question needs.

    >>> sorted(check_template("{% for line in a.splitlines() %}> {{ line|trim }}{% endfor %}{{ b }}"))
    ['a', 'b']
    >>> check_template("{{ a.__class__ }}")
    Traceback (most recent call last):
        ...
    toolkit.judging.sandbox.TemplateError: line 1: .__class__ is not allowed
    """
    if len(source) > LONGEST_TEMPLATE:
        raise TemplateError(f"it has {len(source):,} characters, and {LONGEST_TEMPLATE:,} are allowed")
    try:
        tree = _environment().parse(source)
        # jinja2 calls itself for each level of nesting
        for node in _nodes(tree):
            _check_node(node)
        return find_undeclared_variables(tree) - {"range"}
    except jinja2.TemplateError as error:
        raise TemplateError(str(error)) from error
    except RecursionError as error:
        raise TemplateError("it is nested too deep") from error


def render(source: str, values: Mapping[str, str]) -> str:
    """The text of a template that :func:`check_template` allows. Raises TemplateError where it does too much."""
    rounds = 0

    def counted(items: Iterable[Any]) -> Iterator[Any]:
        nonlocal rounds
        for item in items:
            rounds += 1
            if rounds > MOST_ROUNDS:
                raise TemplateError(f"its loops have more than {MOST_ROUNDS:,} rounds")
            yield item

    environment = _environment()
    environment.filters["counted_rounds"] = counted
    longest = LONGEST_OUTPUT + MOST_COPIES * sum(map(len, values.values()))
    written, length = [], 0
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted_rounds", [], [], None, None, lineno=loop.lineno)
        template = jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)
        for piece in template.generate(**values):
            length += len(piece)
            if length > longest:
                raise TemplateError(f"it writes more than {longest:,} characters")
            written.append(piece)
    except TemplateError:
        raise
    except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}"[:300]) from error
    return "".join(written)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, optimized=False)
    environment.globals = {"range": range}
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    return environment


def _nodes(tree: nodes.Template) -> Iterator[nodes.Node]:
    waiting: list[nodes.Node] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.iter_child_nodes()


def _check_node(node: nodes.Node) -> None:
    """Raises TemplateError."""
    what = ""
    if not isinstance(node, _NODES):
        what = f"{type(node).__name__.lower()}"
    elif isinstance(node, nodes.Filter) and node.name not in FILTERS:
        what = f"the filter {node.name}"
    elif isinstance(node, nodes.For) and node.recursive:
        what = "a recursive loop"
    elif isinstance(node, nodes.Getattr) and not _attribute_allowed(node):
        what = f".{node.attr}"
    elif isinstance(node, nodes.Call) and not _call_allowed(node):
        what = "a call of anything but range() and the methods of text"
    elif isinstance(node, nodes.Getitem) and not _index_allowed(node.arg):
        what = "an index that is no number"
    if what:
        raise TemplateError(f"line {node.lineno}: {what} is not allowed")


def _attribute_allowed(node: nodes.Getattr) -> bool:
    of_loop = isinstance(node.node, nodes.Name) and node.node.name == "loop"
    return node.attr in (LOOP if of_loop else METHODS)


def _call_allowed(node: nodes.Call) -> bool:
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    return isinstance(node.node, nodes.Getattr) or (isinstance(node.node, nodes.Name) and node.node.name == "range")


def _index_allowed(index: nodes.Expr) -> bool:
    if isinstance(index, nodes.Slice):
        return all(part is None or _index_allowed(part) for part in (index.start, index.stop, index.step))
    if isinstance(index, nodes.Neg):
        index = index.node
    return isinstance(index, nodes.Const) and isinstance(index.value, int)
