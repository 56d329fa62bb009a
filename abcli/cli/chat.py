"""`abcli chat`: a conversation on a terminal or from a script."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated

import typer

from abcli.chat.controller import Chat
from abcli.chat.conversation import Overflow
from abcli.chat.session import Session, SessionStore
from abcli.chat.template import load_template
from abcli.cli.options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions, check_argument
from abcli.cli.setup import Ready, ready, resolve_profile
from abcli.config import SamplingConfig, history_file, sessions_directory
from abcli.engine.memory import gibibytes
from abcli.errors import UsageError
from abcli.native.sampler import validate
from abcli.ui.chat_screen import COMMANDS, ChatScreen
from abcli.ui.lines import EditorReader, LineReader, StreamReader
from abcli.ui.terminal import Terminal


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
        bool | None, typer.Option("--stats/--no-stats", help="Speeds after each answer.", show_default="on a terminal")
    ] = None,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
) -> None:
    """Talk with a model: parse, load, and hand over to the screen."""
    if no_save and session is not None:
        raise UsageError("--no-save and --session contradict each other", "drop one of them")
    generation = answer_options.config(sampling_options.config())
    terminal = Terminal()
    engine_config, buckets = resolve_profile(terminal, model_word, model_options, bucket_options)
    store = None if no_save else SessionStore(sessions_directory())
    with ExitStack() as stack:
        resumed = _resume(store, session, stack)
        loaded = stack.enter_context(ready(terminal, engine_config, buckets, verbose=model_options.verbose))
        opened = loaded.opened

        def check(sampling: SamplingConfig) -> None:
            validate(sampling, opened.engine.vocabulary_size)

        check(generation.sampling)
        template = load_template(opened.model, model_options.chat_template, terminal.warn)
        talk = Chat(loaded.generator, opened.engine, template, opened.model.piece, generation, check, overflow=overflow)
        current = _session(loaded, generation.sampling, resumed, session, terminal)
        talk.restore(current)
        if system is not None:
            talk.conversation.system = check_argument(system, "--system")
        interactive = sys.stdin.isatty()
        reader: LineReader = EditorReader(history_file(), list(COMMANDS)) if interactive else StreamReader()
        screen = ChatScreen(
            terminal,
            reader,
            talk,
            loaded.generator,
            store,
            current,
            buckets=len(opened.engine.bases),
            interactive=interactive,
            show_statistics=stats if stats is not None else interactive and terminal.interactive,
            on_created=lambda name: _lock(store, name, stack),
        )
        if interactive:
            _greet(terminal, loaded, talk)
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
    loaded: Ready, sampling: SamplingConfig, resumed: Session | None, name: str | None, terminal: Terminal
) -> Session:
    """The session to continue under today's model and bases; a new one has no name before its first save."""
    header = loaded.opened.header
    session = Session(
        name or "",
        header.name,
        header.file_size + sum(adapter.header.file_size for adapter in header.adapters),
        loaded.opened.engine.bases,
        loaded.buckets.merge,
        sampling=sampling,
    )
    if resumed is None:
        return session
    if (resumed.model, resumed.model_size) != (session.model, session.model_size):
        terminal.warn(f"the session was begun with another model: {resumed.model}")
    return replace(session, messages=resumed.messages, created=resumed.created)


def _greet(terminal: Terminal, loaded: Ready, talk: Chat) -> None:
    engine = loaded.opened.engine
    bases = ", ".join(f"{base:g}" for base in engine.bases)
    terminal.note(f"{loaded.opened.header.name}: {len(engine.bases)} buckets at RoPE bases {bases}")
    size = gibibytes(loaded.opened.memory.total)
    terminal.note(f"context of {engine.context_size:,} tokens; about {size} of memory at most")
    if talk.conversation.turns:
        terminal.note(f"resumed after {talk.conversation.turns} turns")
    terminal.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
