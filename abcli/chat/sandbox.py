"""Chat templates of strangers: jinja2's immutable sandbox with a budget of memory and time.

The sandbox keeps a template away from Python's internals. What it does not stop is a template that builds
something huge or never ends, so whatever can make a value grow spends from a budget first: operators, calls,
filters, loops, literals and output. `_Metering` puts the spending where jinja2 offers no hook.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

from abcli.chat.budget import (
    braces_size,
    check_power,
    flat_size,
    limited,
    percent_size,
    product_size,
    replaced_size,
    spend,
    spend_on,
    watched,
)
from abcli.chat.filters import ALLOWED_FILTERS, PAY_COPY, PAY_WRITTEN, WATCH_LOOP
from abcli.errors import TemplateError

OTHER_TEMPLATE = "choose another template with `chat_template`"

_BASE_BUDGET = 64 * 1024 * 1024
# Templates copy every message a few times on its way through, and many collect the whole text in one variable, which is
# copied a few times for every message.
_COPIES_OF_A_MESSAGE = 64
_COPIES_PER_MESSAGE = 16
_MAX_COPIES_BUDGET = 1024 * 1024 * 1024
_SECONDS = 10.0
_MAX_REASON = 300
_TEXT_METHODS = frozenset(
    (
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii"),
        *("isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower"),
        *("lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition"),
        *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
    )
)
# What a template's own code can raise through jinja2; anything else is a bug of ours.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class RefusalError(TemplateError):
    """The template itself says that it does not take the messages."""


class _RaisedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Rewrites a parsed template so that growth without a hook of its own goes through a filter."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:  # noqa: N802
        # Plain text bypasses `finalize`, through which all output is paid; a constant does not.
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = _through(WATCH_LOOP, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_through(PAY_WRITTEN, item) for item in node.nodes]
        return node

    def visit_List(self, node: nodes.List) -> nodes.List:  # noqa: N802
        self.generic_visit(node)
        node.items = [_through(PAY_WRITTEN, item) for item in node.items]
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Tuple:  # noqa: N802
        self.generic_visit(node)
        if node.ctx == "load":
            node.items = [_through(PAY_WRITTEN, item) for item in node.items]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:  # noqa: N802
        self.generic_visit(node)
        node.value = _through(PAY_WRITTEN, node.value)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _through(PAY_COPY, node) if isinstance(node.arg, nodes.Slice) else node


def _through(filter_name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, filter_name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Set up as Hugging Face sets it up, for which chat templates are written."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_pay_output,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        self.filters = dict(ALLOWED_FILTERS)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes, int, float)):
            return isinstance(obj, str) and attr in _TEXT_METHODS
        if type(obj) is list and attr in ("append", "pop"):
            # A list that the template made itself: those that it is given are of another type.
            return True
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        sandboxed = super().wrap_str_format(value)
        if sandboxed is None:
            return None
        text, format_text = str(value.__self__), sandboxed

        def paying(*arguments: Any, **options: Any) -> str:
            spend(braces_size(text, (arguments, options)))
            return format_text(*arguments, **options)

        return paying

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            spend(flat_size(left) + flat_size(right))
        elif operator == "*":
            spend(product_size(left, right))
        elif operator == "**":
            check_power(left, right)
        elif isinstance(left, str):
            spend(percent_size(left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *arguments: Any, **options: Any) -> Any:
        spend(1)
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if function is dict or (isinstance(owner, list) and name == "append"):
            spend_on(arguments, options)
        elif isinstance(owner, str) and name == "join" and len(arguments) == 1:
            arguments = (list(watched(arguments[0])),)
            spend_on(arguments)
            spend(len(owner) * len(arguments[0]))
        elif isinstance(owner, str) and name == "replace" and len(arguments) >= 2:
            spend(replaced_size(owner, *arguments[:2]))
        elif isinstance(owner, str):
            # A list of one-character parts costs a pointer and an object for each.
            spend(8 * len(owner) if "split" in name else len(owner))
        result = super().call(context, function, *arguments, **options)
        spend(flat_size(result))
        return result


@pass_context
def _pay_output(_context: Context, value: Any) -> Any:
    # Taking the context keeps jinja2 from running this when it compiles.
    spend_on(value)
    return value


def _raise_exception(message: object = "") -> NoReturn:
    raise _RaisedError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise SecurityError(f"it asks for the time as {pattern[:40]!r}")
    return datetime.now().astimezone().strftime(pattern)


class _GivenList(list[Any]):
    """A list that belongs to us: a template may not change it."""


def _given(value: Any) -> Any:
    """`value` with lists that are told from the template's own."""
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items()}
    return _GivenList(map(_given, value)) if isinstance(value, list) else value


@functools.cache
def _environment() -> _Environment:
    return _Environment()


class CompiledTemplate:
    """A template's source, ready to be rendered again and again."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError if `source` is not a template."""
        environment = _environment()
        try:
            # Constant filters already run here.
            with limited(_BASE_BUDGET, _SECONDS):
                tree = _Metering().visit(environment.parse(source))
                tree.set_environment(environment)
                self._template = environment.from_string(tree)
        except _TEMPLATE_FAULTS as error:
            raise TemplateError(
                f"the chat template is broken: {_reason(error)}{_place(error)}", OTHER_TEMPLATE
            ) from error

    def render(self, variables: Mapping[str, Any], *, content_size: int, message_count: int = 1) -> str:
        """The text for `variables`; `content_size` is the length of all the messages in characters.

        Raises TemplateError for whatever goes wrong inside the template, as RefusalError if it was the template that
        refused (`raise_exception`).
        """
        collecting = min(_COPIES_PER_MESSAGE * message_count * content_size, _MAX_COPIES_BUDGET)
        try:
            with limited(_BASE_BUDGET + _COPIES_OF_A_MESSAGE * content_size + collecting, _SECONDS):
                return self._template.render(_given(variables))
        except _RaisedError as error:
            raise RefusalError(_reason(error), OTHER_TEMPLATE) from error
        except SecurityError as error:
            raise TemplateError(
                f"the chat template does what it must not: {_reason(error)}{_place(error)}", OTHER_TEMPLATE
            ) from error
        except _TEMPLATE_FAULTS as error:
            raise TemplateError(f"the chat template fails: {_reason(error)}{_place(error)}", OTHER_TEMPLATE) from error


def _reason(error: BaseException) -> str:
    """The error's text as one line; an error without text is named."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = error.message if isinstance(error, jinja2.TemplateError) else str(error)
    line = " ".join((text or "").split()) or type(error).__name__
    return line if len(line) <= _MAX_REASON else line[:_MAX_REASON] + "..."


def _place(error: BaseException) -> str:
    """The template's line where the error arose, as " (line N)"; empty if that is unknown."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f" (line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f" (line {lines[-1]})" if lines else ""
