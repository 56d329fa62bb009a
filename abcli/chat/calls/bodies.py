"""Reading one call in the form that a format gives it."""

from __future__ import annotations

from collections.abc import Mapping

from abcli.chat.calls.format import CallFormat
from abcli.chat.calls.recorder import Recorder, arguments_text
from abcli.chat.calls.source import NotACallError, Source, Steps, unheard
from abcli.chat.messages import Tool


class CallReader:
    """Reads calls from a source; their names and arguments go to the recorder as they come."""

    def __init__(self, form: CallFormat, tools: Mapping[str, Tool], source: Source, recorder: Recorder) -> None:
        self._format = form
        self._tools = tools
        self._source = source
        self._recorder = recorder

    def read(self, *, begun: bool) -> Steps[None]:
        """Read a call and what ends it; `begun`: the first part of its marker has been read.

        Raises NotACallError, the recorder perhaps having an open call.
        """
        marker = self._format.call_marker
        yield from self._source.expect(" ".join(marker.split()[1:]) if begun else marker)
        if self._format.keys:
            yield from self._object(*self._format.keys)
            yield from self._source.optional(self._format.object_end)
        else:
            yield from self._named()
        self._recorder.finish()

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
            elif key == arguments_key:
                if name:
                    self._recorder.begin(name, identifier)
                    arguments = yield from self._arguments()
                else:
                    arguments = arguments_text((yield from source.json(unheard)))
            else:
                yield from source.json(unheard)
            yield from source.space()
            if not (yield from source.took(",")):
                break
        yield from source.expect("}")
        if not name:
            raise NotACallError
        if not self._recorder.is_open:
            self._recorder.begin(name, identifier)
            self._recorder.argue(arguments)

    def _arguments(self) -> Steps[str]:
        """The arguments as a JSON value, told as they come if it is an object."""
        if (yield from self._source.sees("{")):
            return (yield from self._source.json(self._recorder.argue))
        text = arguments_text((yield from self._source.json(unheard)))
        if not text:
            raise NotACallError
        self._recorder.argue(text)
        return text

    def _named(self) -> Steps[None]:
        raise NotImplementedError
