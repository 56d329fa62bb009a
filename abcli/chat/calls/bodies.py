"""Reading one call in the form that a format gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from abcli.chat.calls.format import ID, NUMBER, CallFormat, Tags, parts
from abcli.chat.calls.literals import ReadKey, gemma_key, gemma_value, python_key, python_value
from abcli.chat.calls.nested_tags import nested_value
from abcli.chat.calls.recorder import Recorder, arguments_text
from abcli.chat.calls.source import NotACallError, Source, Steps, unheard
from abcli.chat.calls.values import resolved, value_text
from abcli.chat.messages import Tool

_NAME = re.compile(r"""[^\s<>\[\]{}()"'=,]*""")
# What models call the arguments, whatever their template does.
_ARGUMENTS_KEYS = ("arguments", "parameters")
_DATA_BEGIN, _DATA_END = "<![CDATA[", "]]>"
_DIGITS = re.compile(r"\d*")


class CallReader:
    """Reads calls from a source; their names and arguments go to the recorder as they come."""

    def __init__(self, form: CallFormat, tools: Mapping[str, Tool], source: Source, recorder: Recorder) -> None:
        self._format = form
        self._tools = tools
        self._source = source
        self._recorder = recorder
        self._marker = parts(form.call_marker)
        self._name_end = parts(form.name_end)
        self._call_end = parts(form.object_end if form.keys else form.call_end)

    def read(self, opener: str) -> Steps[None]:
        """Read a call and what ends it; its marker has been read up to the opener, if there is one.

        Raises NotACallError, the recorder perhaps having an open call.
        """
        read = self._marker.index(opener) + 1 if opener in self._marker else 0
        identifier = yield from self._placed(self._marker[read:])
        if self._format.keys:
            yield from self._object(*self._format.keys)
        else:
            name = yield from self._name(identifier)
            yield from self.arguments(name)
        yield from self._source.optional(self._call_end)
        self._recorder.finish()

    def arguments(self, name: str) -> Steps[None]:
        """Read the arguments of a function whose call has begun."""
        if self._format.tags:
            yield from self._tagged(self._format.tags, self._parameters(name))
        elif self._format.notation == "python":
            yield from self._members(python_key, python_value)
        elif self._format.notation == "gemma":
            yield from self._members(gemma_key, gemma_value)
        else:
            yield from self._json()

    def read_message(self, name: str) -> Steps[None]:
        """Read what a message to a function says: its arguments, perhaps with tags around them."""
        form, source = self._format, self._source
        _, _, inner = form.call_begin.partition(form.channels.message) if form.channels else ("", "", "")
        if inner:
            yield from source.expect(parts(inner))
            name = yield from self._name("")
        else:
            self._recorder.begin(name)
        yield from self.arguments(name)
        yield from source.optional(self._call_end)
        self._recorder.finish()

    def _placed(self, pieces: Sequence[str]) -> Steps[str]:
        """Read the pieces of a marker, placeholders among them; the id, if there is one."""
        identifier = ""
        for piece in pieces:
            yield from self._source.space()
            if piece == ID:
                identifier = yield from self._source.run(_NAME)
            elif piece == NUMBER:
                yield from self._source.run(_DIGITS)
            elif not (yield from self._source.took(piece)) and piece[0] in "<[{]":
                # Words are left out by some models.
                raise NotACallError
        return identifier

    def _name(self, identifier: str) -> Steps[str]:
        """Read a name and what comes before the arguments, of which models leave things out."""
        source, pieces = self._source, self._name_end
        yield from source.space()
        name = yield from source.run(_NAME)
        if pieces[:2] == [":", NUMBER]:
            # The number is a part of what names the call.
            identifier = f"{self._marker[-1]}{name}"
            name, pieces = name.rpartition(":")[0] or name, pieces[2:]
        if not name:
            raise NotACallError
        for piece in pieces:
            yield from source.space()
            if piece == ID:
                identifier = (yield from source.run(_NAME)) or identifier
            elif piece == NUMBER:
                yield from source.run(_DIGITS)
            else:
                yield from source.took(piece)
        yield from source.space()
        plain = not self._format.tags and self._format.notation == "json"
        if plain and not (yield from source.sees("{")):
            raise NotACallError
        self._recorder.begin(name, identifier)
        return name

    def _parameters(self, name: str) -> Mapping[str, Any]:
        """The schemas of a function's parameters, as far as it is known."""
        parameters = self._tools[name].parameters if name in self._tools else {}
        properties = parameters.get("properties")
        if not isinstance(properties, Mapping):
            return {}
        return {key: resolved(schema, parameters) for key, schema in properties.items()}

    def _tagged(self, tags: Tags, schemas: Mapping[str, Any]) -> Steps[None]:
        """Arguments one by one, up to what ends the call; each is told when it is complete."""
        source, told = self._source, 0
        begin = parts(tags.key_begin)
        while True:
            yield from source.space()
            if (yield from source.sees(self._call_end[0])) or not (yield from source.sees(begin[0])):
                break
            yield from source.expect(begin)
            key = yield from self._key(tags)
            text = yield from self._kind(tags)
            on_lines = tags.value_end.startswith("\n")
            value = yield from self._value(parts(tags.end_of(key)), begin[0], on_lines=on_lines)
            written = _unwrapped(value, tags)
            schema = schemas.get(key)
            value = nested_value(written, tags, schema) if tags.nested else value_text(written, schema, text=text)
            self._recorder.argue(f"{', ' if told else '{'}{json.dumps(key, ensure_ascii=False)}: {value}")
            told += 1
        # Without its end, a call that was cut off might have had more arguments.
        if not (yield from source.sees(self._call_end[0])) and not (yield from source.ended()):
            raise NotACallError
        self._recorder.argue("}" if told else "{}")

    def _key(self, tags: Tags) -> Steps[str]:
        pieces = parts(tags.key_end)
        heard: list[str] = []
        if not (yield from self._source.until(pieces[:1], heard.append)):
            raise NotACallError
        yield from self._source.expect(pieces[1:])
        return "".join(heard).strip()

    def _kind(self, tags: Tags) -> Steps[bool | None]:
        """Whether the value is a text, if the format tells."""
        if not tags.kinds:
            return None
        pieces = parts(tags.kind_end)
        heard: list[str] = []
        if not (yield from self._source.until(pieces[:1], heard.append)):
            raise NotACallError
        yield from self._source.expect(pieces[1:])
        return "".join(heard) == dict(tags.kinds)["string"]

    def _value(self, end: Sequence[str], next_key: str, *, on_lines: bool) -> Steps[str]:
        """A value up to what ends it, which has to be followed by another argument or the call's end.

        Where these stand on lines of their own (`on_lines`), models forget the end before them.
        """
        source = self._source
        others = [f"\n{next_key}", f"\n{self._call_end[0]}"] if on_lines else []
        heard: list[str] = []
        while True:
            found = yield from source.until([end[0], *others], heard.append)
            if not found:
                raise NotACallError
            if found in others:
                source.back(len(found))
                return "".join(heard)
            yield from source.expect(end[1:])
            space = yield from source.space()
            if source.closed or (yield from source.sees(next_key)) or (yield from source.sees(self._call_end[0])):
                return "".join(heard)
            heard += [found, space]

    def _object(self, name_key: str, arguments_key: str) -> Steps[None]:
        """One JSON object with a name, arguments and perhaps an id."""
        source = self._source
        name, arguments, identifier = "", "", ""
        yield from source.expect("{")
        while True:
            yield from source.space()
            key = yield from source.text()
            yield from source.expect(":")
            yield from source.space()
            if key == name_key:
                name = yield from source.text()
            elif key in ("id", "tool_call_id") and (yield from source.sees('"')):
                identifier = yield from source.text()
            elif key in (arguments_key, *_ARGUMENTS_KEYS):
                if name and not self._is_unknown(name):
                    self._recorder.begin(name, identifier)
                    arguments = yield from self._json()
                else:
                    arguments = arguments_text((yield from source.json(unheard)))
            else:
                yield from source.json(unheard)
            yield from source.space()
            if not (yield from source.took(",")):
                break
        yield from source.expect("}")
        if not name or self._is_unknown(name):
            raise NotACallError
        if not self._recorder.is_open:
            self._recorder.begin(name, identifier)
            self._recorder.argue(arguments)

    def _members(self, read_key: ReadKey, read_value: ReadKey) -> Steps[None]:
        """Keys and values up to what ends the call; each is told when it is complete."""
        source, told = self._source, 0
        while True:
            yield from source.space()
            if (yield from source.sees(self._call_end[0])):
                break
            if told:
                yield from source.expect([","])
            key = yield from read_key(source)
            value = yield from read_value(source)
            self._recorder.argue(f"{', ' if told else '{'}{key}: {value}")
            told += 1
        self._recorder.argue("}" if told else "{}")

    def _is_unknown(self, name: str) -> bool:
        """Whether an object with this name is an answer in JSON rather than a call."""
        return self._format.bare and name not in self._tools

    def _json(self) -> Steps[str]:
        """The arguments as a JSON value, told as they come if it is an object."""
        if (yield from self._source.sees("{")):
            return (yield from self._source.json(self._recorder.argue))
        text = arguments_text((yield from self._source.json(unheard)))
        if not text:
            raise NotACallError
        self._recorder.argue(text)
        return text


def _unwrapped(written: str, tags: Tags) -> str:
    """A value without the line's ends that the format sets around it."""
    if tags.key_end.endswith("\n") or tags.kind_end.endswith("\n"):
        written = written.removeprefix("\n")
    if tags.value_end.startswith("\n"):
        written = written.removesuffix("\n")
    plain = written.strip()
    data = plain.startswith(_DATA_BEGIN) and plain.endswith(_DATA_END)
    return plain[len(_DATA_BEGIN) : -len(_DATA_END)] if data else written
