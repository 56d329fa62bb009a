"""abcli's models in `llm` (https://llm.datasette.io): a plugin, loaded by llm where it is installed.

`llm -m abcli` asks the default model, `llm -m abcli/NAME` another one that is on this machine. A model stays open for
all that the process asks of it.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click
import llm
from llm.parts import (
    AttachmentPart,
    ReasoningPart,
    StreamEvent,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)
from llm.parts import Message as LLMMessage
from pydantic import Field

from abcli.errors import AbcliError, CancelledError, NativeError, OutOfMemoryError

if TYPE_CHECKING:
    from pathlib import Path

    from abcli.chat.answer import Answer
    from abcli.chat.messages import Message
    from abcli.llm import LLM

_PREFIX = "abcli"
# The options that say how a model is opened; the others are for each answer.
_OPENING = ("buckets", "spread", "merge", "profile", "ctx_size", "gpu_layers")
_ONE_SLOT = 0


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """The default model and all others on this machine."""
    for model_id, (path, aliases) in _installed().items():
        register(AbcliModel(model_id, path), AsyncAbcliModel(model_id, path), aliases=aliases)


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """`llm abcli models` and `llm abcli pull`: abcli's own commands."""

    @cli.group(name=_PREFIX)
    def abcli() -> None:
        """Models of abcli: local, with Attention Buckets."""

    for name, text in (("models", "Show the models on this machine."), ("pull", "Fetch a model from the hub.")):
        settings = {"ignore_unknown_options": True, "help_option_names": []}

        @abcli.command(name=name, help=text, short_help=text, context_settings=settings)
        @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
        @click.pass_context
        def command(context: click.Context, arguments: tuple[str, ...]) -> None:
            from abcli.cli.main import call

            context.exit(call([str(context.info_name), *arguments]))


def _installed() -> dict[str, tuple[Path | None, tuple[str, ...]]]:
    """Of each model of llm the file, None for abcli's default model, and its other names.

    What is wrong with names or folders is no matter of llm's other models.
    """
    from abcli.hub.aliases import aliases
    from abcli.hub.listing import listed_models
    from abcli.hub.locate import DEFAULT_NAME, locate_model

    found: dict[str, tuple[Path | None, tuple[str, ...]]] = {_PREFIX: (None, (f"{_PREFIX}/{DEFAULT_NAME}",))}
    try:
        names = aliases()
        listed = listed_models(names)
    except (AbcliError, OSError):
        return found
    targets: dict[Path, list[str]] = {}
    for alias in sorted(names):
        try:
            targets.setdefault(locate_model(alias).resolve(), []).append(f"{_PREFIX}/{alias}")
        except AbcliError:
            continue
    for model in listed:
        path = model.files[0]
        others = tuple(targets.get(path.resolve(), ()))
        if model.name == DEFAULT_NAME:
            found[_PREFIX] = (None, (*found[_PREFIX][1], *others))
        else:
            name = model.name if model.cached is not None else path.stem
            found.setdefault(f"{_PREFIX}/{name}", (path, others))
    return found


class _Options(llm.Options):
    """What can be given with `-o`; what is not given is as `abcli run` has it."""

    temperature: float | None = Field(default=None, description="0 always takes the likeliest token.")
    top_p: float | None = Field(default=None, description="Sample from the likeliest tokens with this probability.")
    max_tokens: int | None = Field(default=None, description="The most new tokens; -1: until the context is full.")
    seed: int | None = Field(default=None, description="For the same answer again; -1 draws one.")
    thinking: str | None = Field(default=None, description="on, off or auto: whether the model thinks first.")
    buckets: int | None = Field(default=None, description="How many buckets; 1 is the model as it is.")
    spread: str | None = Field(default=None, description="How their RoPE bases lie: symmetric or paper.")
    merge: str | None = Field(default=None, description="How their distributions are merged.")
    profile: str | None = Field(default=None, description="A calibrated profile by its name, or none.")
    ctx_size: int | None = Field(default=None, description="The tokens of prompt and answer together.")
    gpu_layers: int | None = Field(default=None, description="How many layers go to devices; -1: all.")


class _OpenModels:
    """Models that stay open, each under its settings."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[object, ...], LLM] = {}
        self._users: Counter[tuple[object, ...]] = Counter()

    @contextmanager
    def use(self, path: Path | None, settings: dict[str, Any]) -> Iterator[LLM]:
        """The model, loaded if it is not open. Raises what `abcli.load` raises."""
        key = (path, *sorted(settings.items()))
        with self._lock:
            found = self._open.get(key)
            if found is None:
                found = self._open[key] = self._load(path, settings)
            self._users[key] += 1
        try:
            yield found
        finally:
            with self._lock:
                self._users[key] -= 1

    def _load(self, path: Path | None, settings: dict[str, Any]) -> LLM:
        # llama.cpp and numpy take a while to load, and llm asks for the names of all models first.
        from abcli.llm import load

        try:
            return load(path, **settings, warn=_warn)
        except (OutOfMemoryError, NativeError):
            idle = [key for key in self._open if not self._users[key]]
            if not idle:
                raise
            for key in idle:
                self._open.pop(key).close()
            return load(path, **settings, warn=_warn)

    def close(self) -> None:
        """Free all; what is computed is cancelled."""
        while self._open:
            self._open.popitem()[1].close()


_MODELS = _OpenModels()
atexit.register(_MODELS.close)


def _warn(line: str) -> None:
    sys.stderr.write(f"abcli: {line}\n")


class _Abcli:
    """What llm's two kinds of model have in common."""

    can_stream = True
    supports_schema = True
    supports_tools = True

    def __init__(self, model_id: str, path: Path | None) -> None:
        self.model_id = model_id
        self._path = path

    def __str__(self) -> str:
        """As `llm models` lists it."""
        return f"abcli: {self.model_id}"

    def _events(
        self, prompt: llm.Prompt, response: Any, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[StreamEvent]:
        """The answer as llm's events, with what is to be known of it in the response. Raises llm.ModelError.

        Ends early once it is `stopped`.
        """

        def check(*_progress: int) -> None:
            if stopped():
                raise CancelledError

        given = {name: value for name, value in prompt.options if value is not None}
        opening = {name: given.pop(name) for name in _OPENING if name in given}
        if prompt.schema:
            given["json_schema"] = prompt.schema
        if prompt.tools:
            given["tools"] = [_tool(tool) for tool in prompt.tools]
        try:
            messages = [message for given_message in prompt.messages for message in _messages(given_message)]
            with _MODELS.use(self._path, opening) as model:
                asked = model.ask(messages, *model.split(given), held=model.held(_ONE_SLOT))
                with closing(model.answer(asked, check)) as pieces:
                    for piece in pieces:
                        check()
                        if piece.reasoning and not prompt.hide_reasoning:
                            yield StreamEvent("reasoning", piece.reasoning)
                        if piece.text:
                            yield StreamEvent("text", piece.text)
                        if piece.answer is not None:
                            yield from _calls(piece.answer, response)
                            _describe(piece.answer, response, model)
        except AbcliError as error:
            raise llm.ModelError(f"{error.message}\n{error.hint}" if error.hint else error.message) from error


class AbcliModel(_Abcli, llm.Model):
    """A model of abcli's."""

    class Options(_Options):
        """See `_Options`."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None = None
    ) -> Iterator[StreamEvent]:
        """See `llm.Model`."""
        return self._events(prompt, response)


class AsyncAbcliModel(_Abcli, llm.AsyncModel):
    """The same for `async` programs: a thread for each answer, of which one computes at a time."""

    class Options(_Options):
        """See `_Options`."""

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """See `llm.AsyncModel`. A response that is given up is not computed any further."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[StreamEvent | BaseException | None] = asyncio.Queue()
        stopped = threading.Event()

        def put(item: StreamEvent | BaseException | None) -> None:
            # A loop that is closed waits for nothing.
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def compute() -> None:
            try:
                for event in self._events(prompt, response, stopped.is_set):
                    put(event)
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=compute, name="abcli-llm", daemon=True)
        thread.start()
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()


def _messages(message: LLMMessage) -> Iterator[Message]:
    """A message of llm's as abcli's: each result of a tool is one of its own. Raises llm.ModelError."""
    from abcli.chat.messages import Message, ToolCall

    texts, thoughts, calls, results = [], [], [], []
    for part in message.parts:
        if isinstance(part, AttachmentPart) or (isinstance(part, ToolResultPart) and part.attachments):
            raise llm.ModelError("abcli's models read text only: leave the attachment out")
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, ReasoningPart):
            thoughts.append(part.text)
        elif isinstance(part, ToolCallPart):
            calls.append(ToolCall(part.name, json.dumps(part.arguments), part.tool_call_id or ""))
        elif isinstance(part, ToolResultPart):
            results.append(Message("tool", part.output, tool_call_id=part.tool_call_id or "", name=part.name))
    text = "\n".join(texts)
    if message.role == "assistant":
        yield Message("assistant", text, "\n".join(thoughts), tuple(calls))
    elif message.role != "tool":
        yield Message("system" if message.role == "system" else "user", text)
    yield from results


def _tool(tool: Any) -> dict[str, Any]:
    """A tool of llm's as OpenAI's clients write it."""
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _calls(answer: Answer, response: Any) -> Iterator[StreamEvent]:
    """The calls of an answer, for llm to execute. They come whole: some that begin turn out to be none."""
    for call in answer.tool_calls:
        yield StreamEvent("tool_call_name", call.name, tool_call_id=call.id)
        yield StreamEvent("tool_call_args", call.arguments, tool_call_id=call.id)
        response.add_tool_call(llm.ToolCall(call.name, json.loads(call.arguments), call.id))


def _describe(answer: Answer, response: Any, model: LLM) -> None:
    """Tell llm, which logs it, what an answer took and how it came about."""
    usage = answer.usage
    cached = {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens}} if usage.cached_tokens else None
    response.set_usage(input=usage.prompt_tokens, output=usage.completion_tokens, details=cached)
    response.set_resolved_model(model.model.path.name)
    response.response_json = {
        "finish_reason": answer.finish_reason,
        "bases": list(model.bases),
        "merge": model.buckets.merge,
        "agreement": round(answer.agreement, 6),
        "seed": answer.seed,
    }
