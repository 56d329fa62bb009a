"""An answer as it comes, told apart into what is said, thoughts and calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from abcli.chat.calls.bodies import CallReader
from abcli.chat.calls.channels import Channels
from abcli.chat.calls.events import ContentText, Event, ThoughtText, joined
from abcli.chat.calls.format import CallFormat, parts
from abcli.chat.calls.recorder import Recorder
from abcli.chat.calls.source import NotACallError, Source, Steps, unheard
from abcli.chat.messages import Tool, ToolCall


class AnswerParser:
    """Reads one answer, special tokens as text, in pieces of any size: the outcome depends on the whole text alone.

    White space at the edges of what is said and thought is left out where a thought or a call is beside it. What looks
    like a call and is none is taken for something said; if its name had been told already, the call is dropped.
    """

    def __init__(self, form: CallFormat, tools: Sequence[Tool], *, thought_opened: bool = False) -> None:
        """`tools` are those offered; without any, calls are not looked for.

        `thought_opened`: the end of the prompt has begun a thought already (`Thoughts.opened_by`).
        """
        self._format = form
        self._looks_for_calls = bool(tools)
        self._source = Source()
        self._events: list[Event] = []
        self._recorder = Recorder(self._events.append)
        self._reader = CallReader(form, {tool.name: tool for tool in tools}, self._source, self._recorder)
        self._said = _Trimmed(lambda text: self._events.append(ContentText(text)))
        self._functions = frozenset(tool.name for tool in tools)
        self._steps = self._messages(form.channels) if form.channels else self._answer(thought_opened)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete."""
        return tuple(self._recorder.finished)

    def feed(self, text: str) -> list[Event]:
        """What a further piece of the answer makes certain."""
        self._source.feed(text)
        return self._go_on()

    def finish(self, cut: bool) -> list[Event]:
        """The rest, now that nothing more comes; `cut`: the answer did not end by itself."""
        self._source.close(cut)
        return self._go_on()

    def _go_on(self) -> list[Event]:
        next(self._steps, None)
        events = joined(self._events)
        self._events.clear()
        return events

    def _answer(self, thought_opened: bool) -> Steps[None]:
        thoughts, framing = self._format.thoughts, self._format.framing
        openers = self._format.openers if self._looks_for_calls else ()
        begin = [thoughts.begin] if thoughts else []
        if thoughts and thought_opened:
            yield from self._thought(thoughts.end)
        if self._format.bare and self._looks_for_calls:
            self._said.hear((yield from self._source.space()))
            if (yield from self._source.sees("{")):
                yield from self._calls("")
        while found := (yield from self._source.until([*begin, *framing, *openers], self._said.hear)):
            if thoughts and found == thoughts.begin:
                yield from self._thought(thoughts.end)
            elif found in openers:
                yield from self._calls(found)
            else:
                self._said.interrupt()
        self._said.finish()

    def _messages(self, channels: Channels) -> Steps[None]:
        """An answer that is a row of messages."""
        source = self._source
        while True:
            header: list[str] = []
            found = yield from source.until([channels.message, channels.begin], header.append)
            if found == channels.begin:
                continue
            kind, name = channels.kind("".join(header), self._functions)
            if not found:
                # A model that knows of no messages just answers; one word may be a header that was cut off.
                if kind == "said" and (len(name.split()) > 1 or not source.cut):
                    self._said.hear(name)
                break
            if kind == "call" and self._looks_for_calls:
                yield from self._message_to(name)
            elif name:
                self._said.hear(name + found)
            said = kind == "said" or (kind == "thought" and not self._format.thoughts)
            text = self._said if said else _Trimmed(lambda text: self._events.append(ThoughtText(text)))
            if not (said and name):
                text.interrupt()
            yield from source.until(channels.ends, text.hear if kind in ("said", "thought") else unheard)
            self._said.interrupt()
        self._said.finish()

    def _message_to(self, name: str) -> Steps[None]:
        """Read the call that a message to a function is."""
        try:
            yield from self._reader.read_message(name)
        except NotACallError:
            self._recorder.drop()

    def _thought(self, end: str) -> Steps[None]:
        thought = _Trimmed(lambda text: self._events.append(ThoughtText(text)))
        thought.interrupt()
        yield from self._source.until([end], thought.hear)
        self._said.interrupt()

    def _calls(self, opener: str) -> Steps[None]:
        """Read the calls that begin with `opener`."""
        self._source.mark(len(opener))
        try:
            yield from self._section(opener)
            self._source.since_mark()
        except NotACallError:
            self._recorder.drop()
            said = self._source.since_mark()
            # At the end of the answer it was the end that made it none.
            if self._source.cut:
                self._source.skip()
            else:
                self._said.hear(said)
                return
        self._said.interrupt()

    def _section(self, opener: str) -> Steps[None]:
        form, source = self._format, self._source
        in_section = bool(form.section_begin) and opener == form.openers[0]
        if in_section:
            yield from source.expect(parts(form.section_begin)[1:])
            if (yield from source.optional(parts(form.section_end))):
                return
            opener = ""
        while True:
            yield from self._reader.read(opener)
            source.mark()
            if in_section and (yield from source.optional(parts(form.section_end))):
                return
            yield from source.optional(parts(form.between))
            if not in_section:
                return
            opener = ""


class _Trimmed:
    """A text that is passed on without the white space at its edges, where it is told that something is beside it."""

    def __init__(self, hear: Callable[[str], object]) -> None:
        self._hear = hear
        self._waiting = ""
        self._empty = True
        self._interrupted = False

    def hear(self, text: str) -> None:
        """A further piece."""
        self._waiting += text
        body = self._waiting.rstrip()
        if not body:
            return
        rest = self._waiting[len(body) :]
        self._hear(body.lstrip() if self._empty and self._interrupted else body)
        self._waiting, self._empty, self._interrupted = rest, False, False

    def interrupt(self) -> None:
        """Something else stands here."""
        self._interrupted = True

    def finish(self) -> None:
        """Nothing follows."""
        if self._waiting and not self._interrupted:
            self._hear(self._waiting)
