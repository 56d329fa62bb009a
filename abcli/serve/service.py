"""What endpoints ask: a model that is served, and how the server was started; one that writes, with its worker."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, TypeVar

from abcli.chat.answer import Piece
from abcli.chat.asking import Asked
from abcli.chat.calls.events import CallBegun, CallFinished, Event
from abcli.chat.messages import ToolCall
from abcli.chat.options import ChatOptions
from abcli.embedder import Embedder
from abcli.errors import AbcliError
from abcli.generate import Statistics
from abcli.gguf.checked import CheckedModel
from abcli.llm import LLM
from abcli.sampling import GenerationConfig, SamplingConfig
from abcli.serve.chosen import Chosen, Watcher
from abcli.serve.problems import refused
from abcli.serve.tickets import Delivery, Progress, Ticket
from abcli.serve.worker import Worker

# Templates and grammars take processor time: more threads would only slow each other down.
_READERS = 2
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """How a server was started; `seconds` is the most a request may take, `queue` how many may wait.

    `generation` and `options` are what requests leave open.
    """

    alias: str
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    options: ChatOptions = field(default_factory=ChatOptions)
    queue: int = 64
    seconds: float = 600.0
    ping_seconds: float = 15.0
    body_seconds: float = 60.0
    show_slots: bool = True
    show_metrics: bool = True


@dataclass(frozen=True)
class Wanted:
    """What is wanted of an answer beside its text.

    `fresh`: nothing is taken over of other prompts. With `top`, log-probabilities are kept of every token and of so
    many of the likeliest; with `each_bucket` also what each bucket would have said, with `score` also of the prompt's
    tokens. With `timings` every chunk of a stream tells them as they are then, with `progress` it tells how much of the
    prompt is computed.
    """

    fresh: bool = False
    top: int | None = None
    each_bucket: bool = False
    score: bool = False
    timings: bool = False
    progress: bool = False


USUAL = Wanted()


class Served:
    """A loaded model that requests are about. Its coroutines belong to one event loop."""

    lacks = ""
    """What to say to requests of another kind, after the model's name."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="abcli-read")
        self._reading = 0
        self._open = 0

    def close(self) -> None:
        """End what is computed, and wait for that."""
        self._readers.shutdown(cancel_futures=True)

    def stop_soon(self) -> None:
        """End what is computed; for signal handlers, which must not wait for a lock."""
        raise NotImplementedError

    @property
    def accepts(self) -> bool:
        """Whether requests are taken."""
        raise NotImplementedError

    @property
    def description(self) -> Mapping[str, Any]:
        """What `/v1/models` tells of the model beside its name."""
        raise NotImplementedError

    @property
    def capacity(self) -> int:
        """How many answers may run and wait at once."""
        return self.settings.queue + 1

    async def prepare(self, read: Callable[[], Result]) -> Result:
        """The result of `read`, which may take its time, from another thread.

        Raises what it raises, and RefusedError where too many requests wait.
        """
        self.check_room(1)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)
        finally:
            self._reading -= 1

    def check_room(self, count: int) -> None:
        """Raise RefusedError where so many further answers cannot even wait."""
        if self._reading + self._open + count > self.capacity:
            raise refused(
                429, "rate_limit_error", "too many requests are waiting", code="rate_limit_exceeded", Retry_After="5"
            )

    def opened(self, change: int) -> None:
        """Count answers that begin (1) and end (-1)."""
        self._open += change


def described(opened: LLM | Embedder, model: CheckedModel, **more: int) -> dict[str, Any]:
    """What `/v1/models` tells of any model; `more` are further numbers."""
    numbers = {
        "n_ctx": opened.context_size,
        "n_ctx_train": model.header.trained_context,
        "n_vocab": opened.vocabulary_size,
        **more,
        "size": model.header.file_size,
    }
    return {
        "context_length": opened.context_size,
        "max_model_len": opened.context_size,
        "meta": {**numbers, "description": opened.description},
    }


class Service(Served):
    """A model that writes."""

    lacks = "is a model that writes text; for embeddings serve an embedding model, beside it if need be"

    def __init__(self, llm: LLM, settings: Settings) -> None:
        """The model is the caller's to close, after `close`."""
        super().__init__(settings)
        self.llm = llm
        # What constraints need of the vocabulary is made now: later it would hold up everybody for up to a second.
        with suppress(AbcliError):
            llm.check(SamplingConfig(json_schema="{}"))
        self.worker = Worker(llm.engine, llm.generator)
        self.worker.start()

    def close(self) -> None:
        """End what is computed, and wait for that."""
        self.worker.stop()
        self.worker.join()
        super().close()

    def stop_soon(self) -> None:
        """As `close` without waiting; for signal handlers."""
        self.worker.stop_soon()

    @property
    def accepts(self) -> bool:
        """Whether requests are taken."""
        return self.worker.accepts

    @property
    def capacity(self) -> int:
        """How many answers may run and wait at once."""
        return self.worker.slots + self.settings.queue

    @property
    def description(self) -> Mapping[str, Any]:
        """What `/v1/models` tells of the model beside its name."""
        return {**described(self.llm, self.llm.model), "abcli": self.buckets}

    @property
    def buckets(self) -> Mapping[str, Any]:
        """The model's buckets, as clients are told of them."""
        llm = self.llm
        return {
            "bases": list(llm.bases),
            "merge": llm.buckets.merge,
            "profile": llm.profile.name if llm.profile is not None else None,
        }

    def buckets_of(self, generation: GenerationConfig) -> dict[str, Any]:
        """The bases and the merge rule of an answer, as clients are told of them."""
        bases = (self.llm.engine.first_base,) if generation.gate == 0 else self.llm.bases
        return {"bases": list(bases), "merge": generation.merge or self.llm.buckets.merge}

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes that each token stands for; the first use takes its time."""
        return self.llm.pieces

    def answers(
        self,
        asked: Sequence[Asked],
        wanted: Wanted = USUAL,
    ) -> list[Answering]:
        """Let all of `asked` be answered; close each of what is returned.

        Raises RefusedError where there is no room, or the server is stopping.
        """
        self.check_room(len(asked))
        found: list[Answering] = []
        try:
            for item in asked:
                found.append(Answering(self, item, wanted))
        except BaseException:
            for answering in found:
                answering.close()
            raise
        return found


class Answering(AsyncIterator[Piece]):
    """One answer as it comes: an iterator of its pieces, of which the last has the whole.

    Raises what goes wrong. Close it when nobody reads on; closing it twice, or after its end, does nothing.
    """

    def __init__(
        self,
        service: Service,
        asked: Asked,
        wanted: Wanted = USUAL,
    ) -> None:
        self.chosen: list[Chosen] = []
        """What was kept of the tokens so far, where log-probabilities are wanted."""
        self.scored: tuple[Chosen, ...] = ()
        """The same of the prompt's tokens after the first, before the first piece comes."""
        self.statistics: Statistics | None = None
        """Numbers and times as they were with the last piece, where they are wanted of each."""
        self.progress: Progress | None = None
        """How much of the prompt is computed, where that is what the last piece, an empty one, has to tell."""
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delivery] = asyncio.Queue()
        self._ids: dict[int, str] = {}
        self._ended = False
        top = wanted.top
        watcher = None if top is None else Watcher(top, each_bucket=wanted.each_bucket)
        generation = asked.generation if watcher is None else replace(asked.generation, observer=watcher)
        self._ticket = Ticket(
            asked.tokens,
            generation,
            asked.reader(),
            self._hear,
            monotonic() + service.settings.seconds,
            fresh=wanted.fresh,
            score=top if wanted.score else None,
            timings=wanted.timings,
            progress=wanted.progress,
            watcher=watcher,
        )
        service.worker.submit(self._ticket)
        service.opened(1)

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        delivery = await self._queue.get()
        if delivery.scored:
            self.scored = delivery.scored
            delivery = await self._queue.get()
        self.progress = delivery.progress
        if delivery.progress is not None:
            return Piece("")
        if delivery.error is not None:
            self._end()
            raise delivery.error
        self.statistics = delivery.statistics
        assert delivery.piece is not None  # noqa: S101 - it is the one or the other
        if delivery.piece.answer is not None:
            self._end()
        self.chosen += delivery.chosen
        return self._with_own_ids(delivery.piece)

    def close(self) -> None:
        """Nobody reads on."""
        if not self._ended:
            self._service.worker.give_up(self._ticket)
            self._end()

    async def aclose(self) -> None:
        """As `close`, for `contextlib.aclosing`."""
        self.close()

    def _hear(self, delivery: Delivery) -> None:
        """Take a delivery from the worker's thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delivery)

    def _end(self) -> None:
        self._ended = True
        self._service.opened(-1)

    def _with_own_ids(self, piece: Piece) -> Piece:
        """The piece with ids of calls that no other answer has."""
        if piece.events:
            piece = replace(piece, events=tuple(map(self._named, piece.events)))
        if piece.answer is not None and piece.answer.tool_calls:
            calls = (self._renamed(number, call) for number, call in enumerate(piece.answer.tool_calls))
            piece = replace(piece, answer=replace(piece.answer, tool_calls=tuple(calls)))
        return piece

    def _named(self, event: Event) -> Event:
        if isinstance(event, CallBegun):
            self._ids[event.index] = f"call_{secrets.token_hex(12)}"
            return replace(event, id=self._ids[event.index])
        if isinstance(event, CallFinished):
            return replace(event, call=self._renamed(event.index, event.call))
        return event

    def _renamed(self, index: int, call: ToolCall) -> ToolCall:
        return replace(call, id=self._ids.get(index, call.id))
