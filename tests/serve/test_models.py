"""Several models in one server: loaded when they are asked for, unloaded when nobody needs them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.errors import CancelledError, ModelFileError, UsageError
from abcli.serve.models import Models
from abcli.serve.problems import RefusedError
from abcli.serve.service import Served, Settings

NAMES = ("a", "b", "c")


class Shelf:
    """Opens models that are nothing, and knows which are open."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.most = 0
        self.log: list[str] = []
        self.broken: set[str] = set()

    def opener(self, name: str) -> Callable[[], AbstractContextManager[Served]]:
        @contextmanager
        def opened() -> Iterator[Served]:
            if name in self.broken:
                raise ModelFileError(f"{name} is broken")
            self.open.add(name)
            self.most = max(self.most, len(self.open))
            self.log.append(f"+{name}")
            yield Nothing(Settings(name))
            self.open.remove(name)
            self.log.append(f"-{name}")

        return opened

    def models(self, most: int, names: tuple[str, ...] = NAMES, **settings: Any) -> Models:
        return Models(Settings("", **settings), {name: self.opener(name) for name in names}, most)


class Nothing(Served):
    """A model that does nothing."""

    accepts = True
    description: Mapping[str, Any] = {}

    def stop_soon(self) -> None:
        pass


def run(models: Models, work: Callable[[], Awaitable[None]]) -> None:
    """Do something with models in a loop of its own, and close them."""

    async def within_reason() -> None:
        await asyncio.wait_for(work(), 30)

    try:
        asyncio.run(within_reason())
    finally:
        models.close()


async def settled() -> None:
    """Let everything go on that can."""
    for _ in range(20):
        await asyncio.sleep(0.002)


def test_the_one_used_least_recently_goes() -> None:
    shelf = Shelf()
    models = shelf.models(2)

    async def work() -> None:
        for name in ("a", "b", "a", "c", "a", "b"):
            served = await models.take(name)
            assert served.settings.alias == name
            models.give_back(name)
            assert models.status(name) == "loaded"
        assert [models.status(name) for name in NAMES] == ["loaded", "loaded", "unloaded"]

    run(models, work)
    assert shelf.log == ["+a", "+b", "-b", "+c", "-c", "+b", "-a", "-b"]


def test_a_model_that_is_held_stays_and_the_next_waits() -> None:
    shelf = Shelf()
    models = shelf.models(1)

    async def work() -> None:
        await models.take("a")
        waiting = [asyncio.ensure_future(models.take("b")) for _ in range(2)]
        await settled()
        assert not any(task.done() for task in waiting)
        assert shelf.open == {"a"}
        # Who comes for `a` now does not keep `b` waiting for ever.
        late = asyncio.ensure_future(models.take("a"))
        await settled()
        assert not late.done()
        models.give_back("a")
        assert [served.settings.alias for served in await asyncio.gather(*waiting)] == ["b", "b"]
        assert shelf.open == {"b"}
        await settled()
        assert not late.done()
        models.give_back("b")
        await settled()
        assert not late.done()
        models.give_back("b")
        assert (await late).settings.alias == "a"
        models.give_back("a")

    run(models, work)
    assert shelf.log == ["+a", "-a", "+b", "-b", "+a", "-a"]


def test_whichever_is_idle_first_makes_room() -> None:
    shelf = Shelf()
    models = shelf.models(2)

    async def work() -> None:
        await models.take("a")
        await models.take("b")
        waiting = asyncio.ensure_future(models.take("c"))
        await settled()
        models.give_back("b")
        await waiting
        assert shelf.open == {"a", "c"}
        # `a` was to go first, and is not any more.
        await asyncio.wait_for(models.take("a"), 1)
        for name in ("a", "a", "c"):
            models.give_back(name)

    run(models, work)


def test_who_goes_while_waiting_holds_nothing() -> None:
    shelf = Shelf()
    models = shelf.models(1)

    async def work() -> None:
        await models.take("a")
        gone = asyncio.ensure_future(models.take("b"))
        await settled()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        models.give_back("a")
        await settled()
        # Nobody holds `b`, so that it goes for the next one.
        await models.take("c")
        models.give_back("c")

    run(models, work)
    assert shelf.open == set()


def test_a_model_that_does_not_load_says_why_and_may_be_tried_again() -> None:
    shelf = Shelf()
    shelf.broken = {"b"}
    models = shelf.models(2)

    async def work() -> None:
        for found in await asyncio.gather(models.take("b"), models.take("b"), return_exceptions=True):
            assert isinstance(found, RefusedError)
            assert (found.problem.status, found.problem.code) == (500, "model_not_loaded")
            # Why, the log says: it names paths.
            assert "is broken" not in found.problem.message
        assert models.status("b") == "unloaded"
        shelf.broken.clear()
        await models.take("b")
        models.give_back("b")

    run(models, work)


def test_waiting_has_its_limits() -> None:
    shelf = Shelf()
    models = shelf.models(1, queue=1, seconds=0.1)

    async def work() -> None:
        await models.take("a")
        waiting = asyncio.ensure_future(models.take("b"))
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="too many"):
            await models.take("b")
        with pytest.raises(RefusedError, match="in time"):
            await waiting
        models.give_back("a")
        await settled()

    run(models, work)


def test_who_waits_is_told_that_the_server_stops() -> None:
    shelf = Shelf()
    models = shelf.models(1)

    async def work() -> None:
        await models.take("a")
        waiting = asyncio.ensure_future(models.take("b"))
        await settled()
        models.stop_soon()
        with pytest.raises(CancelledError):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(CancelledError):
            await models.take("a")
        models.give_back("a")
        await settled()

    run(models, work)
    assert shelf.open == set()


def test_which_model_a_name_means() -> None:
    models = Shelf().models(2)
    assert models.resolve("b") == "b"
    with pytest.raises(RefusedError, match="there is no model 'd'; there are a, b, c") as caught:
        models.resolve("d")
    assert (caught.value.problem.status, caught.value.problem.code) == (404, "model_not_found")
    for name in (None, "", 3):
        with pytest.raises(UsageError, match="model"):
            models.resolve(name)
    models.close()
    # Where there is just one, it is meant.
    models = Shelf().models(1, ("a",))
    assert [models.resolve(name) for name in (None, "", 3, "gpt-5", "a")] == ["a"] * 5
    models.close()


def test_the_first_ones_are_loaded_before_anything_is_asked() -> None:
    shelf = Shelf()
    models = shelf.models(2)
    models.load()
    assert list(models.loaded) == ["a", "b"]
    models.close()
    models.close()
    assert shelf.open == set()


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3), st.booleans()), max_size=25),
    st.integers(1, 3),
)
def test_nobody_waits_for_ever_and_nobody_loses_a_model(asks: list[tuple[str, int, bool]], most: int) -> None:
    """Requests hold models for a while, or go while they wait; each gets its own, loaded for as long as it holds it."""
    shelf = Shelf()
    models = shelf.models(most)

    async def ask(name: str, turns: int) -> None:
        served = await models.take(name)
        try:
            for _ in range(turns + 1):
                assert models.loaded[name] is served
                assert name in shelf.open
                await asyncio.sleep(0)
        finally:
            models.give_back(name)

    async def work() -> None:
        tasks = []
        for name, turns, goes in asks:
            tasks.append(asyncio.ensure_future(ask(name, turns)))
            await asyncio.sleep(0)
            if goes:
                tasks[-1].cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert found is None or isinstance(found, asyncio.CancelledError)
        await settled()

    run(models, work)
    assert shelf.most <= most
    assert shelf.open == set()
