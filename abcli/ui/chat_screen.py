"""The chat as a person or a script drives it: messages, slash commands, streamed answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from abcli.chat.controller import Chat, Pieces
from abcli.chat.files import read_text_file
from abcli.chat.session import Session, SessionStore, export_session, import_session
from abcli.errors import AbcliError, CancelledError, UsageError
from abcli.text import counted
from abcli.trace.page import check_name, save_trace
from abcli.ui.lines import Entry, LineReader, read_message
from abcli.ui.terminal import Terminal, on_interrupt
from abcli.ui.tool_desk import ToolDesk


@dataclass(frozen=True)
class Command:
    """A slash command: what it takes, what it does."""

    argument: str
    help: str
    action: Callable[[ChatScreen, str], None]


class ChatScreen:
    """Reads messages and commands until the end of the input; every turn is saved to the session."""

    def __init__(
        self,
        terminal: Terminal,
        reader: LineReader,
        chat: Chat,
        cancel: Callable[[], None],
        store: SessionStore | None,
        session: Session,
        *,
        desk: ToolDesk,
        buckets: int,
        interactive: bool,
        show_statistics: bool,
        on_created: Callable[[str], object] = lambda _name: None,
    ) -> None:
        """`store` is None for a chat that is not to be saved; `on_created` hears the name of a new session.

        Ctrl-C ends a chat that is not interactive.
        """
        self.terminal = terminal
        self.chat = chat
        self.session = session
        self._reader = reader
        self._desk = desk
        self._cancel = cancel
        self._store = store
        self._buckets = buckets
        self._interactive = interactive
        self._on_created = on_created
        self._show_statistics = show_statistics
        self._attached: list[str] = []
        self._leaving = False
        self.failed = False
        self.saved = False

    def loop(self) -> None:
        """Serve messages until /exit, Ctrl-D or the end of standard input."""
        while not self._leaving:
            try:
                entry = read_message(lambda continued: self._reader.line(continued=continued))
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self.terminal.note("Ctrl-D or /exit leaves")
                continue
            except AbcliError as error:
                self._fail(error)
                continue
            try:
                self.handle(entry)
            except CancelledError:
                if not self._interactive:
                    raise
                self.terminal.end_line()
                self.terminal.note("stopped")
            except AbcliError as error:
                self._fail(error)

    def handle(self, entry: Entry) -> None:
        """Carry out a command or answer a message. Raises AbcliError; the chat can go on after it."""
        message = entry.text
        if not message.strip() and not self._attached:
            return
        if not entry.is_block and (name := command_name(message)):
            command = COMMANDS.get(name)
            if command is None:
                raise UsageError(f"there is no command {name}", "/help lists them; a space before / makes it text")
            command.action(self, message[len(name) :].strip())
            return
        text = "\n\n".join([*self._attached, message] if message.strip() else self._attached)
        with self._saving():
            self._show(lambda progress: self.chat.ask(text, progress))
        self._attached.clear()
        self._call()

    def help(self, _argument: str) -> None:
        """List the commands."""
        for name, command in COMMANDS.items():
            self.terminal.note(f"{f'{name} {command.argument}':<18}{command.help}")
        self.terminal.note('"""               begins and ends a message of many lines')
        self.terminal.note("Ctrl-C            stops the answer; Ctrl-D leaves; Up recalls what was typed")

    def leave(self, _argument: str) -> None:
        """End the loop."""
        self._leaving = True

    def clear(self, _argument: str) -> None:
        """Begin anew under the same system prompt."""
        self.chat.conversation.clear()
        self._attached.clear()
        self._save()
        self.terminal.note("the conversation is empty")

    def undo(self, _argument: str) -> None:
        """Take back what was read for the next message, else the last message and its answer."""
        if self._attached:
            self._attached.clear()
            self.terminal.note("took back what was read")
            return
        if not self.chat.conversation.undo():
            raise UsageError("there is nothing to undo", "ask something first")
        self._save()
        self.terminal.note(f"took back the last turn; {self.chat.conversation.turns} left")

    def regenerate(self, _argument: str) -> None:
        """Answer the last message again."""
        with self._saving():
            self._show(self.chat.regenerate)
        self._call()

    def set(self, argument: str) -> None:
        """Change a setting."""
        name, _, value = argument.partition(" ")
        if not name:
            raise UsageError("/set needs a name and a value", "e.g. /set temp 0.2; /show lists the settings")
        self.chat.set(name, value.strip())
        self._save()
        self.terminal.note(f"{name} = {value.strip()}")

    def show(self, _argument: str) -> None:
        """The session, the model and the settings."""
        session = self.session
        self.terminal.note(f"session  {session.name or 'not saved yet'}")
        self.terminal.note(f"model    {session.model}")
        self.terminal.note(f"bases    {', '.join(f'{base:g}' for base in session.bases)}; merge {session.merge}")
        turns = counted(self.chat.conversation.turns, "turn")
        self.terminal.note(f"context  {self.chat.used_tokens}/{self.chat.context_size} tokens, {turns}")
        for name, value in self.chat.settings().items():
            self.terminal.note(f"{name} = {value}")

    def save(self, argument: str) -> None:
        """Write the conversation to a file."""
        if not argument:
            raise UsageError("/save needs a file name", "e.g. /save chat.json, or .md for reading")
        path = Path(argument).expanduser()
        export_session(self.chat.store(self.session), path)
        self.terminal.note(f"saved to {path}")

    def load(self, argument: str) -> None:
        """Continue a conversation from a file."""
        if not argument:
            raise UsageError("/load needs a file name", "e.g. /load chat.json")
        self.chat.restore(import_session(Path(argument).expanduser()))
        self._save()
        self.terminal.note(f"loaded {counted(self.chat.conversation.turns, 'turn')}")

    def read(self, argument: str) -> None:
        """Place a file before the next message."""
        if not argument:
            raise UsageError("/read needs a file name", "e.g. /read notes.txt, then ask about it")
        text = read_text_file(Path(argument).expanduser())
        self._attached.append(text)
        self.terminal.note(f"read {counted(len(text), 'character')}, to go before your next message")

    def thoughts(self, _argument: str) -> None:
        """Show what was thought before the last answer."""
        thoughts = (message.reasoning_content for message in reversed(self.chat.conversation.messages))
        self.terminal.note(next(filter(None, thoughts), "nothing was thought yet"))

    def trace(self, argument: str) -> None:
        """Write what the buckets saw of the last answer to a file."""
        if not argument:
            raise UsageError("/trace needs a file name", "e.g. /trace answer.html")
        path = Path(argument).expanduser()
        check_name(path)
        with on_interrupt(self._cancel), self.terminal.tracing() as progress:
            trace = self.chat.trace(progress)
        save_trace(trace, path)
        self.terminal.note(f"written to {path}")

    def _call(self) -> None:
        """Get the results of the calls of tools in an answer, and let the model go on, as long as it calls more."""
        for _round in range(self._desk.max_rounds):
            calls = self.chat.pending_calls
            if not calls:
                return
            results = self._desk.results(calls)
            with self._saving():
                self._show(lambda progress, results=results: self.chat.reply(results, progress))  # type: ignore[misc]
        if self.chat.pending_calls:
            self.terminal.warn(f"stopped after {counted(self._desk.max_rounds, 'round')} of calls: `max_rounds`")

    def _show(self, answering: Callable[[Callable[[int, int], None]], Pieces]) -> None:
        """Stream an answer, its thought folded; Ctrl-C stops it."""
        answer, thought = None, ""
        with (
            on_interrupt(self._cancel),
            self.terminal.prefill_progress() as progress,
            # Even if the output breaks, the conversation has to be whole again before it is saved.
            closing(answering(progress)) as pieces,
        ):
            try:
                for piece in pieces:
                    if answer is None and self.chat.dropped_turns:
                        self.terminal.warn(
                            f"the context is full: left out are the oldest {counted(self.chat.dropped_turns, 'turn')}"
                        )
                    answer = piece.running
                    thought += piece.reasoning
                    if piece.reasoning and self._interactive and thought == piece.reasoning:
                        self.terminal.note("thinking ...")
                    if piece.text and thought and self._interactive:
                        self.terminal.note(f"(thought in {counted(len(thought.split()), 'word')}: /thoughts)")
                        thought = ""
                    self.terminal.write_answer(piece.text)
            finally:
                self.terminal.end_line()
        if answer is None:
            return
        if not self.chat.answered:
            self.terminal.warn("the answer is empty, so the conversation is as before")
        if answer.finish_reason == "length" and self.chat.used_tokens >= self.chat.context_size:
            self.terminal.warn("the answer ends here because the context is full")
        if self._show_statistics:
            self.terminal.statistics(answer.statistics, self.chat.used_tokens, self.chat.context_size, self._buckets)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Save the session after the block even if it was interrupted: a part of an answer is kept, too."""
        try:
            yield
        finally:
            self._save()

    def _save(self) -> None:
        self.session = self.chat.store(self.session)
        if self._store is None or not (self.session.name or self.session.messages):
            return
        if not self.session.name:
            new = self._store.create()
            self._on_created(new.name)
            self.session = replace(self.session, name=new.name, created=new.created)
        self.session = self._store.save(self.session)
        self.saved = True

    def _fail(self, error: AbcliError) -> None:
        self.failed = True
        self.terminal.error(error)


def command_name(message: str) -> str:
    """The command that a message begins with, known or misspelt; empty for text, also if that begins with a path."""
    name = message.split(maxsplit=1)[0] if message.startswith("/") else ""
    if name in COMMANDS:
        return name
    return "" if "/" in name[1:] or not name[1:].isalpha() or Path(name).exists() else name


COMMANDS = {
    "/help": Command("", "list the commands", ChatScreen.help),
    "/clear": Command("", "begin anew under the same system prompt", ChatScreen.clear),
    "/undo": Command("", "take back the last message and its answer, or what /read read", ChatScreen.undo),
    "/regen": Command("", "answer the last message again", ChatScreen.regenerate),
    "/read": Command("FILE", "place a text file before the next message", ChatScreen.read),
    "/set": Command("NAME VALUE", "change a setting: /set temp 0.2", ChatScreen.set),
    "/show": Command("", "show the session, the model and the settings", ChatScreen.show),
    "/thoughts": Command("", "show what was thought before the last answer", ChatScreen.thoughts),
    "/trace": Command("FILE", "write what the buckets saw of the last answer to FILE (.html)", ChatScreen.trace),
    "/save": Command("FILE", "write the conversation to FILE (.json, or .md for reading)", ChatScreen.save),
    "/load": Command(
        "FILE", "continue the conversation in FILE (.json, also another tool's messages)", ChatScreen.load
    ),
    "/exit": Command("", "leave", ChatScreen.leave),
    "/bye": Command("", "leave", ChatScreen.leave),
}
