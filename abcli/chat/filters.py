"""The jinja2 filters a chat template may use, each paying for what it builds.

Filters that chat templates do not need and that can blow a value up (center, batch, wordwrap, ...) are left out;
a template that uses one is refused when it is compiled.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, do_format, do_indent, do_replace, do_round, sync_do_join, sync_do_sum
from jinja2.nodes import EvalContext
from jinja2.utils import pass_environment, pass_eval_context

from abcli.chat.budget import flat_size, percent_size, replaced_size, spend, spend_on, watched

# The names under which `sandbox` calls its own filters; a template cannot spell them.
PAY_WRITTEN = "pay written"
PAY_COPY = "pay copy"
WATCH_LOOP = "watch loop"

_MAX_INDENT = 64
_MAX_PRECISION = 20
# These write their argument out, or copy its text.
_TEXT = ("capitalize", "e", "escape", "lower", "string", "title", "trim", "upper", "wordcount")
# These look at items, or pass them on.
_STRUCTURE = (
    *("abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
    *("length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr"),
    *("sort", "unique"),
)


def _paying(function: Callable[..., Any], *, written: bool) -> Callable[..., Any]:
    """`function`, spending its arguments first (as text, or one pointer a character) and its result after."""

    # functools.wraps keeps jinja2's marks that say which context to pass.
    @functools.wraps(function)
    def paying(*arguments: Any, **options: Any) -> Any:
        if written:
            spend_on(arguments, options)
        else:
            spend(sum(flat_size(text) for text in arguments if isinstance(text, str)) * 8)
        result = function(*arguments, **options)
        spend(flat_size(result))
        return result

    return paying


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(watched(value))
    spend_on(items)
    spend(len(items) * len(str(d)))
    return sync_do_join(context, items, d, attribute)


@pass_eval_context
def _replace(context: EvalContext, value: Any, old: str, new: str, count: int | None = None) -> str:
    spend_on(value, old, new)
    spend(replaced_size(str(value), str(old), str(new)))
    return do_replace(context, value, old, new, count)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > _MAX_INDENT:
        raise SecurityError(f"it indents by more than {_MAX_INDENT} characters")
    spend_on(value)
    spend((str(value).count("\n") + 1) * _MAX_INDENT)
    return do_indent(value, width, first, blank)


def _format(value: str, *arguments: Any, **options: Any) -> str:
    spend(percent_size(str(value), options or arguments))
    return do_format(value, *arguments, **options)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > _MAX_PRECISION:
        raise SecurityError(f"it rounds to more than {_MAX_PRECISION} digits")
    return do_round(value, precision, method)


@pass_environment
def _sum(environment: Any, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    # The sum of lists copies every item once per list.
    if not isinstance(start, (int, float)):
        raise SecurityError("it sums up something other than numbers")
    return sync_do_sum(environment, watched(value), attribute, start)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: jinja2's own filter also escapes HTML."""
    if (indent if isinstance(indent, int) else len(indent or "")) > _MAX_INDENT:
        raise SecurityError(f"it indents by more than {_MAX_INDENT} characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_watched_list
    )
    pieces = []
    for piece in encoder.iterencode(value):
        spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _watched_list(value: Any) -> list[Any]:
    """What `map` and the like hand out, which llama.cpp writes as a list. Raises TypeError for anything else."""
    if not isinstance(value, Iterator):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return list(watched(value))


def _pay_written(value: Any) -> Any:
    spend_on(value)
    return value


def _pay_copy(value: Any) -> Any:
    spend(flat_size(value))
    return value


def _watch_loop(value: Iterable[Any]) -> Iterable[Any]:
    return watched(value)


ALLOWED_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _paying(FILTERS[name], written=True) for name in _TEXT},
    **{name: _paying(FILTERS[name], written=False) for name in _STRUCTURE},
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "tojson": _to_json,
    PAY_WRITTEN: _pay_written,
    PAY_COPY: _pay_copy,
    WATCH_LOOP: _watch_loop,
}
