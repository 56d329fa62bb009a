"""The models of a server: loaded when they are asked for, and unloaded for others when nobody needs them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any

from abcli.errors import AbcliError, CancelledError, UsageError
from abcli.serve.problems import RefusedError, refused
from abcli.serve.service import Served, Settings

log = logging.getLogger("abcli.serve")

Open = Callable[[], AbstractContextManager[Served]]
"""Loads a model; it is unloaded when the context ends."""


@dataclass(eq=False)
class _Model:
    """A model by name; `users` requests hold it, and `waiting` ones are to get it once it is loaded."""

    name: str
    open: Open
    served: Served | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    users: int = 0
    used: float = 0.0
    leaving: bool = False
    """It is to be unloaded as soon as nobody holds it: further requests wait until it is back."""
    waiting: list[asyncio.Future[Served]] = field(default_factory=list)
    coming: asyncio.Task[None] | None = None

    def load(self) -> None:
        self.served = self.stack.enter_context(self.open())

    def unload(self) -> None:
        self.served = None
        self.stack.close()


class Models:
    """The models that can be asked; at most `most` of them are loaded at once, those that were used last.

    A request holds its model from `take` to `give_back`, and a model that is held stays loaded. Who wants another one
    waits, in turn. The coroutines belong to one event loop; models are loaded and unloaded on a thread of their own.
    """

    def __init__(self, settings: Settings, models: Mapping[str, Open], most: int | None = None) -> None:
        """`models` has at least one; they are loaded when they are first asked for, or by `load`."""
        self.settings = settings
        self.started = int(time())
        self._models = {name: _Model(name, opens) for name, opens in models.items()}
        self._most = len(models) if most is None else most
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="abcli-load")
        # Only one model comes or goes at a time.
        self._swapping = asyncio.Lock()
        self._given_back = asyncio.Event()

    @classmethod
    def of(cls, service: Served) -> Models:
        """Just one model, which is loaded and stays the caller's to close."""
        found = cls(service.settings, {service.settings.alias: lambda: closing(service)})
        found._models[service.settings.alias].served = service
        return found

    def load(self) -> None:
        """Load as many as may be loaded at once, the first ones; before anything is asked. Raises what that does."""
        for model in list(self._models.values())[: self._most]:
            model.load()

    def close(self) -> None:
        """Unload everything; after the event loop has ended."""
        self._loader.shutdown(cancel_futures=True)
        for model in self._models.values():
            model.unload()

    def stop_soon(self) -> None:
        """End what is computed; for signal handlers, which must not wait for a lock."""
        self._stopping = True
        for served in self.loaded.values():
            served.stop_soon()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_waiting)

    def _end_waiting(self) -> None:
        """Tell those who wait for a model that it will not come."""
        for model in self._models.values():
            for granted in model.waiting:
                if not granted.done():
                    granted.set_exception(CancelledError())

    @property
    def accepts(self) -> bool:
        """Whether requests are taken."""
        return not self._stopping and all(served.accepts for served in self.loaded.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models."""
        return tuple(self._models)

    @property
    def loaded(self) -> dict[str, Served]:
        """The models that are loaded now, by name."""
        found = ((name, model.served) for name, model in self._models.items())
        return {name: served for name, served in found if served is not None}

    def status(self, name: str) -> str:
        """What is with a model, in llama-server's words."""
        model = self._models[name]
        if model.served is not None:
            return "loaded"
        return "loading" if model.coming is not None else "unloaded"

    def resolve(self, name: Any) -> str:
        """The model that a request means by `name`: where there is just one, any name means it.

        Raises RefusedError for one that is not there, UsageError for none and for what is no name.
        """
        if len(self._models) == 1:
            return next(iter(self._models))
        if not isinstance(name, str) or not name:
            raise UsageError("'model' is missing, or no text", f"name one of {self._list()}", setting="model")
        if name not in self._models:
            raise refused(
                404,
                "not_found_error",
                f"there is no model {name!r:.200}; there are {self._list()}",
                code="model_not_found",
            )
        return name

    def _list(self) -> str:
        return ", ".join(self._models)

    async def take(self, name: str) -> Served:
        """A model, loaded; `give_back` it.

        Raises RefusedError where it takes too long or cannot be loaded, CancelledError where the server is stopping.
        """
        if self._stopping:
            raise CancelledError
        model = self._models[name]
        if model.served is not None and not model.leaving:
            model.users += 1
            return model.served
        if len(model.waiting) >= self.settings.queue:
            raise refused(429, "rate_limit_error", f"too many requests wait for {name}", Retry_After="5")
        self._loop = asyncio.get_running_loop()
        granted: asyncio.Future[Served] = self._loop.create_future()
        model.waiting.append(granted)
        if model.coming is None:
            model.coming = asyncio.ensure_future(self._bring(model))
        try:
            await asyncio.wait((granted,), timeout=self.settings.seconds)
        except asyncio.CancelledError:
            if not granted.cancel() and granted.exception() is None:
                self.give_back(name)
            raise
        if granted.cancel():
            raise refused(503, "timeout_error", f"{name} could not be loaded in time", code="timeout", Retry_After="5")
        return granted.result()

    def give_back(self, name: str) -> None:
        """A request that took a model is over."""
        model = self._models[name]
        model.users -= 1
        model.used = monotonic()
        if not model.users:
            self._given_back.set()

    async def _bring(self, model: _Model) -> None:
        """Load a model, and let those have it that wait for it."""
        error: RefusedError | None = None
        async with self._swapping:
            try:
                if model.served is None:
                    await self._make_room()
                    await self._on_loader(model.load)
            except Exception as found:  # whatever it is, nobody must wait for ever
                error = _not_loaded(model.name, found)
            waiting, model.waiting, model.coming = model.waiting, [], None
            for granted in waiting:
                if granted.done():
                    continue
                if error is not None:
                    granted.set_exception(error)
                elif model.served is not None:
                    model.users += 1
                    granted.set_result(model.served)

    async def _make_room(self) -> None:
        """Unload until one more may be loaded: the model that nobody holds and that was used least recently.

        Where all are held, the one used least recently takes no more requests until it is unloaded, or another is.
        """
        try:
            while len(here := [model for model in self._models.values() if model.served is not None]) >= self._most:
                min(here, key=lambda model: model.used).leaving = True
                victim = min(here, key=lambda model: (model.users > 0, model.used))
                if victim.users:
                    self._given_back.clear()
                    await self._given_back.wait()
                    continue
                victim.leaving = True
                await self._on_loader(victim.unload)
        finally:
            for model in self._models.values():
                model.leaving = False

    async def _on_loader(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._loader, work)


def _not_loaded(name: str, error: Exception) -> RefusedError:
    """What those are told who wait for a model: where it lies, and what of the machine it needs, is for the log."""
    log.error("%s cannot be loaded: %s", name, error, exc_info=None if isinstance(error, AbcliError) else error)
    return refused(500, "server_error", f"{name} cannot be loaded; the server's log says why", code="model_not_loaded")
