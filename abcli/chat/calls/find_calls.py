"""The format of calls, from what a template writes for probes that differ in one thing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from abcli.chat.calls.differences import common_beginning, common_end, shared_beginning, shared_end
from abcli.chat.calls.format import ID, NUMBER, CallFormat, Tags
from abcli.chat.calls.parser import AnswerParser
from abcli.chat.calls.probes import ANSWER, IDS, KEYS, NAMES, VALUES, Form, Probes
from abcli.chat.messages import Tool

# What ends a turn in which calls are made, where other turns end otherwise.
_TURN_ENDS = ("<|eom_id|>", "<|call|>", "<|calls|>")
_NAME_KEY = re.compile(r'\{[^{}]*"(\w+)":\s*"\Z')
_ARGUMENTS_KEY = re.compile(r'",[^{}]*"(\w+)":\s*\Z')
_TYPED: dict[str, Any] = {
    "string": VALUES[0],
    "number": 70707,
    "boolean": True,
    "array": [70707],
    "object": {"qzinnerqz": 70707},
}
# What Llama's models may set before calls that are nothing but JSON.
_PYTHON_TAG = "<|python_tag|>"
_COUNTS = ((0, 1), (1, 2))


@dataclass(frozen=True)
class _Call:
    """One call in a text: what is before and after its name, and after its arguments, which are JSON."""

    before: str
    name_end: str
    after: str

    @classmethod
    def json(cls, text: str, name: str, arguments: Any) -> _Call | None:
        """The call of a function whose arguments are these, None if the text has it not as JSON."""
        before, found, behind = text.partition(name)
        brace = behind.rfind("{", 0, behind.find(KEYS[0]))
        if not found or brace < 0:
            return None
        try:
            value, length = json.JSONDecoder().raw_decode(behind[brace:])
        except ValueError:
            return None
        return cls(before, behind[:brace], behind[brace + length :]) if value == arguments else None


def find_calls(probes: Probes, known: Sequence[str]) -> CallFormat | None:
    """The format of calls, None where there is none that reads back what it writes.

    `known` are the markers of thoughts and of what is said, which may stand before calls.
    """
    form = probes.form
    if form is None:
        return None
    texts = _Texts(probes, form, known)
    found = _json_format(texts) or _tagged_format(texts)
    if found is None:
        return None
    found = replace(found, name=_title(found), bare_begin=_PYTHON_TAG if found.bare else "")
    return found if _reads_back(found, texts) else None


class _Texts:
    """What a template writes for calls, without what it writes around any answer."""

    def __init__(self, probes: Probes, form: Form, known: Sequence[str]) -> None:
        self._probes, self._form, self._known = probes, form, known
        self._before, _, self._after = probes.answer().partition(ANSWER)

    def of(self, *calls: Mapping[str, Any]) -> str:
        """The text of calls with these arguments, ids in it as placeholders."""
        text = self._probes.calls(self._form, *calls)
        for identifier in IDS:
            text = text.replace(identifier, ID)
        text = text[len(common_beginning(text, self._before)) :]
        text = text[: len(text) - len(common_end(text, self._after))].rstrip()
        for end in _TURN_ENDS:
            text = text.removesuffix(end)
        return self._without_known(text)

    def _without_known(self, text: str) -> str:
        """`text` without an empty thought and the like at its beginning."""
        while found := next((mark for mark in self._known if text.lstrip().startswith(mark)), ""):
            text = text.lstrip().removeprefix(found).lstrip()
        return text


def _json_format(texts: _Texts) -> CallFormat | None:
    """The format of calls whose arguments are written as JSON."""
    arguments = {KEYS[0]: VALUES[0]}
    one = _Call.json(texts.of(arguments), NAMES[0], arguments)
    if one is None:
        return None
    name_key, arguments_key = _NAME_KEY.search(one.before), _ARGUMENTS_KEY.search(one.name_end)
    keys = (name_key.group(1), arguments_key.group(1)) if name_key and arguments_key else None
    first = _Call.json(texts.of(arguments, arguments), NAMES[0], arguments)
    second = _Call.json(first.after, NAMES[1], arguments) if first else None
    if first is None or second is None:
        return CallFormat("", one.before, one.name_end, one.after, keys=keys, several=False)
    name_end = _numbered(one.name_end, second.name_end)
    return None if name_end is None else _divided(first.before, name_end, second.before, second.after, keys=keys)


def _divided(before: str, name_end: str, middle: str, after: str, **fields: Any) -> CallFormat:
    """The format of calls with `middle` between the arguments of one and the name of the next."""
    before, middle = max(_numberings(before, middle), key=lambda pair: len(common_end(*pair)))
    call_begin = common_end(before, middle)
    between = middle[: len(middle) - len(call_begin)]
    call_end = common_beginning(after, between)
    return CallFormat(
        "",
        call_begin,
        name_end,
        call_end,
        section_begin=before[: len(before) - len(call_begin)],
        section_end=after[len(call_end) :],
        between=between[len(call_end) :],
        **fields,
    )


def _numberings(first: str, second: str) -> list[tuple[str, str]]:
    """Two texts as they are, and with the numbers in them that may be those of two calls in a row as placeholders."""
    return [
        (first, second),
        *((_with_number(first, low), _with_number(second, high)) for low, high in _COUNTS),
    ]


def _with_number(text: str, number: int) -> str:
    return re.sub(rf"(?<=[\":]){number}(?![\w.])", NUMBER, text)


def _numbered(first: str, second: str) -> str | None:
    """The text that both are but for the number of the call, None if they differ otherwise."""
    return next((one for one, other in _numberings(first, second) if one == other), None)


def _tagged_format(texts: _Texts) -> CallFormat | None:
    """The format of calls whose arguments are written one by one."""
    two = _split(texts.of({KEYS[0]: VALUES[0], KEYS[1]: VALUES[1]}), NAMES[0], KEYS[0], VALUES[0], KEYS[1], VALUES[1])
    calls = _split(
        texts.of({KEYS[0]: VALUES[0]}, {KEYS[0]: VALUES[0]}),
        *(NAMES[0], KEYS[0], VALUES[0]),
        *(NAMES[1], KEYS[0], VALUES[0]),
    )
    if two is None or any(KEYS[0] in text or KEYS[1] in text for text in two):
        return None
    before, to_key, to_value, to_next, _, after = two
    value_end = common_beginning(to_next, after)
    key_begin = common_end(to_key, to_next[len(value_end) :])
    if not key_begin or not value_end:
        return None
    value_end = to_next[: len(to_next) - len(key_begin)]
    tags = _tags(texts, key_begin, to_value, value_end)
    name_end = to_key[: len(to_key) - len(key_begin)]
    if calls is None:
        return CallFormat("", before, name_end, after[len(value_end) :], tags=tags, several=False)
    name_end = _numbered(name_end, calls[4][: len(calls[4]) - len(key_begin)]) or name_end
    cut = len(value_end)
    return _divided(calls[0], name_end, calls[3][cut:], calls[6][cut:], tags=tags)


def _split(text: str, *marks: str) -> list[str] | None:
    """What is before, between and after marks in a text, None if one is missing."""
    found = []
    for mark in marks:
        before, mark, text = text.partition(mark)
        if not mark:
            return None
        found.append(before)
    return [*found, text]


def _tags(texts: _Texts, key_begin: str, to_value: str, value_end: str) -> Tags:
    """The marks around arguments, with what they say about the types of values."""
    words: dict[str, str] = {}
    for kind, value in _TYPED.items():
        _, _, behind = texts.of({KEYS[0]: value}).partition(KEYS[0])
        written = value if isinstance(value, str) else json.dumps(value)
        if written in behind:
            words[kind] = behind.partition(written)[0]
    beginning = shared_beginning(words.values())
    if beginning == to_value:
        return Tags(key_begin, to_value, value_end)
    end = shared_end(words.values())
    # The words are in quotes.
    beginning, end = beginning[: beginning.rfind('"') + 1], end[end.find('"') :]
    kinds = tuple((kind, word[len(beginning) : len(word) - len(end)]) for kind, word in words.items())
    return Tags(key_begin, beginning, value_end, kinds, end)


def _title(form: CallFormat) -> str:
    what = "tagged arguments" if form.tags else "JSON" if form.keys else "a name and JSON"
    return f"bare {what}" if form.bare else f"{what} after {form.openers[0]}"


def _reads_back(form: CallFormat, texts: _Texts) -> bool:
    """Whether calls that the template writes are read as the same calls."""
    parameters = {"properties": {KEYS[0]: {"type": "string"}, KEYS[1]: {"type": "integer"}}}
    tools = [Tool(name, "", parameters) for name in NAMES]
    arguments: list[dict[str, Any]] = [{KEYS[0]: VALUES[0], KEYS[1]: 7}, {}]
    for calls in (arguments[:1], arguments[1:], arguments)[: 3 if form.several else 2]:
        parser = AnswerParser(form, tools)
        parser.feed(texts.of(*calls))
        parser.finish(cut=False)
        if [(call.name, json.loads(call.arguments)) for call in parser.calls] != list(zip(NAMES, calls, strict=False)):
            return False
    return True
