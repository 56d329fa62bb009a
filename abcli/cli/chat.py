"""`abcli chat`: a conversation on a terminal or from a script."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated

import typer

from abcli.chat.asking import check_together
from abcli.chat.controller import Chat
from abcli.chat.conversation import Overflow
from abcli.chat.session import Session, SessionStore
from abcli.cli._chat_options import ChatFlags
from abcli.cli._flags import flag
from abcli.cli._options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions
from abcli.cli._setup import opened, prepared
from abcli.cli._tool_options import ToolRunFlags
from abcli.config import history_file, sessions_directory
from abcli.errors import UsageError
from abcli.grammar.check import check
from abcli.llm import LLM
from abcli.sampling import SamplingConfig
from abcli.text import counted, gibibytes
from abcli.ui.chat_screen import COMMANDS, ChatScreen
from abcli.ui.lines import line_reader
from abcli.ui.terminal import Terminal
from abcli.ui.tool_desk import ToolDesk


def chat(
    model_word: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model file or name (default: the default model).")
    ] = None,
    *,
    system: Annotated[str | None, typer.Option("--system", "-sys", help="The system prompt.")] = None,
    session: Annotated[
        str | None, typer.Option("--session", help="Continue the session of this name, or begin it.")
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep nothing on disk.")] = False,
    overflow: Annotated[
        Overflow,
        typer.Option(help="When the context is full: stop with an error, or leave out the oldest turns."),
    ] = "error",
    stats: Annotated[
        bool | None, flag("Speeds after each answer.", "--stats/--no-stats", show_default="on a terminal")
    ] = None,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
    chat_flags: ChatFlags,
    tool_flags: ToolRunFlags,
) -> None:
    """Talk with a model: parse, load, and hand over to the screen."""
    if no_save and session is not None:
        raise UsageError("--no-save and --session contradict each other", "drop one of them")
    generation = answer_options.config(sampling_options.config(), bucket_options.threshold())
    check(generation.sampling)
    interactive = sys.stdin.isatty()
    tool_flags.check(interactive=interactive)
    terminal = Terminal()
    store = None if no_save else SessionStore(sessions_directory())
    with ExitStack() as stack:
        servers = tool_flags.servers(stack, terminal)
        options = chat_flags.options(tool_flags.offered(servers, terminal))
        check_together(options, generation.sampling)
        runners = tool_flags.runners(options.tools, servers)
        found = prepared(terminal, model_word, model_options, bucket_options)
        resumed = _resume(store, session, stack)
        llm = stack.enter_context(opened(terminal, found, model_options))
        llm.check(generation.sampling)
        talk = llm.chat(overflow=overflow, generation=generation, options=options)
        current = _session(llm, generation.sampling, resumed, session, terminal)
        talk.restore(current)
        if system is not None:
            talk.conversation.system = answer_options.text(system, "--system")
        reader = line_reader(history_file(), list(COMMANDS))
        screen = ChatScreen(
            terminal,
            reader,
            talk,
            llm.cancel,
            store,
            current,
            desk=ToolDesk(terminal, reader, runners, ask_first=not tool_flags.yes, max_rounds=tool_flags.max_rounds),
            buckets=len(llm.bases),
            interactive=interactive,
            show_statistics=stats if stats is not None else interactive and terminal.interactive,
            on_created=lambda name: _lock(store, name, stack),
        )
        if interactive:
            _greet(terminal, llm, talk)
        screen.loop()
        if interactive and screen.saved:
            terminal.note(f"saved; continue with: abcli chat --session {screen.session.name}")
        if screen.failed and not interactive:
            raise typer.Exit(1)


def _resume(store: SessionStore | None, name: str | None, stack: ExitStack) -> Session | None:
    """The stored session called `name`, locked until the stack closes; None if there is none yet."""
    if store is None or name is None:
        return None
    _lock(store, name, stack)
    return store.load(name) if store.path(name).exists() else None


def _lock(store: SessionStore | None, name: str, stack: ExitStack) -> None:
    """Keep other chats off the session until the stack closes."""
    if store is not None:
        stack.enter_context(store.lock(name))


def _session(
    llm: LLM, sampling: SamplingConfig, resumed: Session | None, name: str | None, terminal: Terminal
) -> Session:
    """The session to continue under today's model and bases; a new one has no name before its first save."""
    model = llm.model
    session = Session(
        name or "",
        model.name,
        model.header.file_size + sum(adapter.header.file_size for adapter in model.adapters),
        llm.bases,
        llm.buckets.merge,
        sampling=sampling,
    )
    if resumed is None:
        return session
    if (resumed.model, resumed.model_size) != (session.model, session.model_size):
        terminal.warn(f"the session was begun with another model: {resumed.model}")
    return replace(session, messages=resumed.messages, created=resumed.created)


def _greet(terminal: Terminal, llm: LLM, talk: Chat) -> None:
    bases = ", ".join(f"{base:g}" for base in llm.bases)
    at = "RoPE base" if len(llm.bases) == 1 else "RoPE bases"
    terminal.note(f"{llm.model.name}: {counted(len(llm.bases), 'bucket')} at {at} {bases}")
    size = gibibytes(llm.memory.total)
    terminal.note(f"context of {llm.context_size:,} tokens; about {size} of memory at most")
    if talk.conversation.turns:
        terminal.note(f"resumed after {counted(talk.conversation.turns, 'turn')}")
    terminal.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
