"""Checks a GBNF grammar before llama.cpp parses it.

llama.cpp reports most mistakes only on stderr, and some grammars end the process: deep nesting overflows its
stack, `{5,2}` repeats until memory is full, and left recursion hidden behind a rule that may be empty grows
without end. This is its parser (llama_grammar_parser, src/llama-grammar.cpp) with limits and line numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from abcli.errors import GrammarError
from abcli.grammar.gbnf_rules import TERMINAL, Rules, check_rules, left_recursive_rule

MAX_BYTES = 1 << 20
MAX_NESTING = 1000
MAX_REPETITIONS = 2000  # llama.cpp's MAX_REPETITION_THRESHOLD
MAX_ELEMENTS = 200_000

_ESCAPE = r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])'
_ELEMENT = re.compile(rf"{_ESCAPE}|.", re.DOTALL)
_TOKEN = re.compile(
    rf"""
    (?P<space>(?:[ \t]|\#[^\r\n]*)+) | (?P<newline>\r\n|\r|\n)
    | (?P<define>::=) | (?P<name>[A-Za-z0-9-]+)
    | (?P<literal>"(?:[^"\\]|{_ESCAPE})*") | (?P<range>\[(?:[^\]\\]|{_ESCAPE})*\]) | (?P<any>\.)
    | (?P<repeat>[*+?]|\{{[ \t]*[0-9]+[ \t]*(?:,[ \t]*[0-9]*[ \t]*)?\}})
    | (?P<open>\() | (?P<close>\)) | (?P<or>\|) | (?P<token>!?<[^>]*>)
    """,
    re.VERBOSE,
)
_SYNTAX_HINT = "see llama.cpp's grammars/README.md for the syntax of GBNF"
_SIMPLER_HINT = "use fewer or smaller repetitions"


@dataclass
class _Group:
    """A rule body, or a parenthesis in one, that is being read."""

    rule: int
    line: int
    symbols_before: int
    alternatives: list[list[int]] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    item_start: int = 0
    item_elements: int = 0
    repeated: int = 1

    def add(self, *items: int, elements: int, repeated: int = 1) -> None:
        self.item_start = len(self.sequence)
        self.sequence.extend(items)
        self.item_elements = elements
        self.repeated = repeated

    def next_alternative(self) -> None:
        self.alternatives.append(self.sequence)
        self.sequence = []
        self.item_start = self.item_elements = 0
        self.repeated = 1


def check(text: str) -> None:
    """Raise GrammarError, with the line where there is one, if `text` is not a grammar llama.cpp can serve.

    Stricter than llama.cpp in four ways: more than 2000 repetitions are refused instead of made unlimited,
    no rule may be defined twice, token references (`<...>`) are refused because accepting a token that
    matches them only in part ends the process, and there are limits on size, nesting and ambiguity.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise GrammarError(f"the grammar is not valid Unicode at position {error.start}", "save it as UTF-8") from None
    if size > MAX_BYTES:
        raise GrammarError(f"the grammar has {size:,} bytes", f"at most {MAX_BYTES:,} are allowed")
    check_rules(_Parser().parse(text))


def reason_to_refuse(text: str) -> str | None:
    """Why llama.cpp refuses a grammar that `check` has passed; None where that is not known."""
    name = left_recursive_rule(_Parser().parse(text))
    return f"the rule {name!r} begins with itself (left recursion)" if name is not None else None


class _Parser:
    def __init__(self) -> None:
        self._rules = Rules()
        self._groups: list[_Group] = []
        self._elements = 0
        self._rule_name: str | None = None

    def parse(self, text: str) -> Rules:
        previous = "newline"
        line = 1
        for kind, value, line in _tokens(text):
            if kind == "newline":
                # Elsewhere a newline is but space: inside parentheses, after "::=" and after "|".
                if len(self._groups) > 1 or previous in ("define", "or"):
                    continue
                if self._groups:
                    self._close_group()
            elif self._groups:
                self._read_body(kind, value, line)
            else:
                self._read_head(kind, value, line, previous)
            previous = kind
        if len(self._groups) > 1:
            raise _syntax_error(self._groups[-1].line, "'(' is never closed")
        if self._rule_name is not None:
            raise _syntax_error(line, f"'::=' is missing after {self._rule_name!r}")
        if self._groups:
            self._close_group()
        return self._rules

    def _read_head(self, kind: str, value: str, line: int, previous: str) -> None:
        if self._rule_name is None and kind == "name":
            self._rule_name = value
        elif self._rule_name is not None and kind == "define" and previous == "name":
            rule = self._rules.identify(self._rule_name, line)
            if self._rules.is_defined(rule):
                raise _syntax_error(line, f"the rule {self._rule_name!r} is defined twice")
            self._groups.append(_Group(rule, line, symbols_before=0))
            self._rule_name = None
        else:
            raise _syntax_error(line, f"{value!r} where a rule 'name ::= ...' should start")

    def _read_body(self, kind: str, value: str, line: int) -> None:
        group = self._groups[-1]
        if kind == "name":
            group.add(self._rules.identify(value, line), elements=self._count(1, line))
        elif kind in ("literal", "range", "any"):
            inner = value if kind == "any" else value[1:-1].removeprefix("^" if kind == "range" else "")
            elements = self._count(len(_ELEMENT.findall(inner)), line)
            group.add(*([TERMINAL] if elements else []), elements=elements)
        elif kind == "repeat":
            self._repeat(group, value, line)
        elif kind == "or":
            group.next_alternative()
        elif kind == "open":
            self._open_group(group, line)
        elif kind == "close" and len(self._groups) > 1:
            self._close_group()
        elif kind == "token":
            raise _syntax_error(line, f"references to tokens like {value} are not supported")
        else:
            raise _syntax_error(line, f"unexpected {value!r}")

    def _open_group(self, group: _Group, line: int) -> None:
        if len(self._groups) > MAX_NESTING:
            raise GrammarError(
                f"line {line} of the grammar nests more than {MAX_NESTING} parentheses", "give parts a rule"
            )
        symbols_before = len(self._rules)
        self._groups.append(_Group(self._rules.generate(group.rule), line, symbols_before))

    def _close_group(self) -> None:
        group = self._groups.pop()
        group.next_alternative()
        self._rules.define(group.rule, group.alternatives)
        if self._groups:
            symbols = max(1, len(self._rules) - group.symbols_before)
            self._groups[-1].add(group.rule, elements=self._count(1, group.line), repeated=symbols)

    def _repeat(self, group: _Group, operator: str, line: int) -> None:
        """`S{m,n}` becomes m times S and n - m optional ones, a rule each, as in llama.cpp."""
        least, most = _bounds(operator, line)
        item = group.sequence[group.item_start :]
        if not item:
            raise _syntax_error(line, f"there is nothing that {operator!r} could repeat")
        group.repeated *= most or least or 1
        if group.repeated > MAX_REPETITIONS:
            raise GrammarError(f"line {line} of the grammar repeats more than {MAX_REPETITIONS} rules", _SIMPLER_HINT)
        optional = 1 if most is None else most - least
        # Charged before it is built: a rule weighs some elements itself.
        self._count(group.item_elements * max(0, least - 1) + (group.item_elements + 8) * optional, line)
        group.sequence[group.item_start :] = item * least
        last = -1
        for _ in range(optional):
            rule = self._rules.generate(group.rule)
            rest = [rule] if most is None else [] if last < 0 else [last]
            self._rules.define(rule, [item + rest, []])
            last = rule
        if optional:
            group.sequence.append(last)
        group.item_elements = group.item_elements * least + (1 if optional else 0)

    def _count(self, elements: int, line: int) -> int:
        self._elements += elements
        if self._elements > MAX_ELEMENTS:
            raise GrammarError(f"the grammar grows beyond {MAX_ELEMENTS:,} elements in line {line}", _SIMPLER_HINT)
        return elements


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, text and line number (from 1) of everything but spaces and comments."""
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            rest = text[position : position + 20].splitlines()[0]
            raise _syntax_error(line, f"cannot read {rest!r}")
        kind, value = str(match.lastgroup), match.group()
        if kind != "space":
            yield kind, value, line
        # A newline counts as llama.cpp's own parser skips it, also inside a text.
        line += len(re.findall(r"\r\n|\r|\n", value)) if kind in ("newline", "literal", "range") else 0
        position = match.end()


def _bounds(operator: str, line: int) -> tuple[int, int | None]:
    """Least and most repetitions, None for no limit."""
    if operator in "*+?":
        return (1 if operator == "+" else 0), (1 if operator == "?" else None)
    numbers = [part.strip() for part in operator[1:-1].split(",")]
    if any(len(number.lstrip("0")) > len(str(MAX_REPETITIONS)) for number in numbers):
        raise _too_many(operator, line)
    least = int(numbers[0])
    most = least if len(numbers) == 1 else int(numbers[1]) if numbers[1] else None
    if max(least, most or 0) > MAX_REPETITIONS:
        raise _too_many(operator, line)
    if most is not None and most < least:
        raise _syntax_error(line, f"{operator} ends before it begins")
    return least, most


def _too_many(operator: str, line: int) -> GrammarError:
    shown = operator if len(operator) < 40 else f"{operator[:40]}..."
    return GrammarError(
        f"line {line} of the grammar repeats too often: {shown}",
        f"repeat at most {MAX_REPETITIONS} times, or without a limit: *",
    )


def _syntax_error(line: int, what: str) -> GrammarError:
    return GrammarError(f"line {line} of the grammar: {what}", _SYNTAX_HINT)
