"""An answer as it comes, told apart into what is said, thoughts and calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from abcli.chat.calls.bodies import CallReader
from abcli.chat.calls.events import ContentText, Event, ThoughtText, joined
from abcli.chat.calls.format import CallFormat
from abcli.chat.calls.recorder import Recorder
from abcli.chat.calls.source import NotACallError, Source, Steps
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
        self._cut = False
        self._steps = self._answer(thought_opened)

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
        self._cut = cut
        self._source.closed = True
        return self._go_on()

    def _go_on(self) -> list[Event]:
        next(self._steps, None)
        events = joined(self._events)
        self._events.clear()
        return events

    def _answer(self, thought_opened: bool) -> Steps[None]:
        thoughts = self._format.thoughts
        if thoughts and thought_opened:
            yield from self._thought(thoughts.end)
        markers = [thoughts.begin] if thoughts else []
        markers += self._format.openers if self._looks_for_calls else ()
        while found := (yield from self._source.until(markers, self._said.hear)):
            if thoughts and found == thoughts.begin:
                yield from self._thought(thoughts.end)
            else:
                yield from self._calls(found)
        self._said.finish()

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
            if self._cut:
                self._source.skip()
            else:
                self._said.hear(said)
                return
        self._said.interrupt()

    def _section(self, opener: str) -> Steps[None]:
        form, source = self._format, self._source
        in_section = opener == form.openers[0] and bool(form.section_begin)
        if in_section:
            yield from source.expect(" ".join(form.section_begin.split()[1:]))
        begun = not in_section
        while True:
            yield from self._reader.read(begun=begun)
            source.mark()
            if not in_section or (yield from source.optional(form.section_end)):
                return
            begun = False
            yield from source.optional(form.between)


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
