"""Renders Jinja templates from files that are not trusted: they read only their input, and time and size are bounded.

Jinja's sandbox keeps a template from the interpreter's objects, but not from two nested loops of 100,000 turns or a
text of a gigabyte. Here each template is rewritten before it is compiled. Every turn of a loop costs units, and so does
every value that is read, in proportion to its size. A rendering has a budget of units that grows with its input.
Operations that make large values of small ones (`*`, `**`, widths of formats, large numbers as arguments) have limits
of their own.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

BUDGET = 3 * 10**8  # units of a rendering, besides those for its input: some seconds of work at most
UNITS_A_TURN, UNITS_AN_ITEM, UNITS_A_CHARACTER, UNITS_OF_INPUT = 1000, 200, 10, 2000
LARGEST_NUMBER = 100_000  # as an argument: a width, a count
LARGEST_VALUE = 1_000_000  # items or characters that `*` may make
LARGEST_TEXT = 10**8  # characters that replacing or joining may make
WIDTH = re.compile(r"\d{6,}")
# Errors that the code of a template may raise, besides Jinja's own.
FAILURES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
MULTIPLYING = ("replace", "join", "wordwrap", "indent")  # filters and methods whose output is a product of their inputs
CHEAP = ("length", "count", "first", "last", "default", "d")  # filters that do not go over their input
# Kinds of nodes -> their fields whose values are read whole.
READING: dict[type[nodes.Node], tuple[str, ...]] = {
    nodes.Output: ("nodes",),
    nodes.Concat: ("nodes",),
    nodes.Add: ("left", "right"),
    nodes.Compare: ("expr",),
    nodes.Operand: ("expr",),
    nodes.Test: ("args",),
}


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja environment: `bounded` makes its templates, and `start` gives the next rendering its budget."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.left = 0
        del self.globals["lipsum"], self.filters["urlize"], self.filters["pprint"]  # slow, and of no use in a chat
        # They take the context, since Jinja computes other filters of constants when it compiles.
        self.filters["_turn"] = pass_context(lambda context, value: self.spend(UNITS_A_TURN))
        self.filters["_charge"] = pass_context(lambda context, value: self.charge(value))
        self.filters["_small"] = pass_context(lambda context, value: _small(value))
        for name in MULTIPLYING:
            self.filters[name] = _guarded(name, self.filters[name])

    def start(self, input_characters: int) -> None:
        self.left = BUDGET + UNITS_OF_INPUT * input_characters

    def spend(self, units: int) -> bool:
        """Return true. Raises TemplateError where the budget is spent."""
        self.left -= units
        if self.left < 0:
            raise TemplateError("it computes for too long (nested loops, or texts that grow with every turn)")
        return True

    def charge(self, value: Any) -> Any:
        """Return `value` after paying for reading it. Raises TemplateError where the budget is spent."""
        self.spend(10 + (UNITS_A_CHARACTER if isinstance(value, str) else UNITS_AN_ITEM) * _size(value))
        return value

    def bounded(self, source: str) -> Template:
        """Return the template of the text `source`. Raises jinja2.TemplateError for a statement that is not allowed."""
        tree = self.parse(source)
        for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            if found := next(tree.find_all(kind), None):
                name = kind.__name__.lower()
                raise TemplateError(f"line {found.lineno}: {name} reads another file, which a chat template cannot")
        return self.from_string(_Charging().visit(tree))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "*" and (product := _size(left) * _number(right) + _size(right) * _number(left)):
            if product > LARGEST_VALUE:
                raise TemplateError(f"a product of more than {LARGEST_VALUE} items")
            self.spend(UNITS_A_CHARACTER * product)
        elif operator in ("*", "**") and _bits(left) * (_number(right) if operator == "**" else 1) > 10_000:
            raise TemplateError("a number of thousands of digits")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **options: Any) -> Any:
        for value in (*args, *options.values()):
            if function is not self.globals["range"]:  # which has a limit of its own
                _small(value)
            self.charge(value)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | list):
            self.charge(owner)
            if name in ("format", "format_map"):
                _check_format(str(owner), args)
            elif name in (*MULTIPLYING, "translate", "expandtabs"):
                _check_product(name, (owner, *args))
        return super().call(context, function, *args, **options)


class _Charging(NodeTransformer):
    """Rewrites a template so that each turn of a loop, each call of a macro and each value that is read costs units."""

    def _turns(self, node: Any) -> Any:
        self.generic_visit(node)
        turn = nodes.ExprStmt(_filter(nodes.Const(True), "_turn"), lineno=node.lineno)
        node.body = [turn, *node.body]
        if getattr(node, "test", None) is not None:
            node.test = nodes.And(_filter(nodes.Const(True), "_turn"), node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = _turns

    def generic_visit(self, node: nodes.Node, *args: Any, **options: Any) -> nodes.Node:
        super().generic_visit(node, *args, **options)
        for name in READING.get(type(node), ()):
            found = getattr(node, name)
            operands = found if isinstance(found, list) else [found]
            charged = [n if isinstance(n, nodes.TemplateData) else _filter(n, "_charge") for n in operands]
            setattr(node, name, charged if isinstance(found, list) else charged[0])
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "_charge")
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.name not in CHEAP:
            node.args = [_filter(argument, "_small") for argument in node.args]
            for pair in node.kwargs:
                pair.value = _filter(pair.value, "_small")
            if node.node is not None:
                node.node = _filter(_filter(node.node, "_charge"), "_small" if node.name == "format" else "_charge")
        return node


def _filter(node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _small(value: Any) -> Any:
    if isinstance(value, int | float) and abs(value) > LARGEST_NUMBER:
        raise TemplateError(f"{value!r:.20} is too large a number for an argument")
    if isinstance(value, str) and "%" in value and WIDTH.search(value):
        raise TemplateError(f"{value!r:.40} is too wide a format")
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        _check_product(name, (*args, *options.values()))
        return function(*args, **options)

    return checked


def _check_product(name: str, values: Iterable[Any]) -> None:
    """Raise TemplateError where the two largest of `values` could make too long a text together."""
    one, two, *_ = sorted((1 + _length(value) for value in (*values, "", "")), reverse=True)
    if one * two > LARGEST_TEXT:
        raise TemplateError(f"{name} could make a text of more than {LARGEST_TEXT} characters")


def _length(value: Any) -> int:
    """Return the characters of a text, or of all texts in a list."""
    if isinstance(value, list | tuple):
        return sum(1 + _size(item) for item in value)
    return _size(value) if isinstance(value, str) else 0


def _check_format(text: str, values: Iterable[Any]) -> None:
    if WIDTH.search(text):
        raise TemplateError(f"{text!r:.40} is too wide a format")
    for value in values:
        _small(value)


def _size(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _number(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0
