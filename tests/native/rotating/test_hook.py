from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.config import ContextConfig
from abcli.native import ggml_api as api
from abcli.native.context import BatchPart, Context
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.rotating.context import FusedContext, SlotPart
from abcli.native.rotating.hook import acting, compute_hook, get_hook, hook_obstacle, rope_hook
from abcli.native.rotating.image import PointerError, address_of

BASES = (5_000.0, 10_000.0, 20_000.0)


class Counting:
    """Does what ggml does, and counts."""

    def __init__(self) -> None:
        self.rotations = self.graphs = 0

    def rope(self, original: Any, arguments: tuple[Any, ...]) -> int:
        self.rotations += 1
        return int(original(*arguments))

    def compute(self, original: Any, scheduler: int, graph: int) -> int:
        self.graphs += 1
        return int(original(scheduler, graph))


SETTINGS = ContextConfig(context_size=256, threads=2)


def plain(model: Model) -> np.ndarray:
    """The logits of a context that has nothing to do with buckets."""
    row = np.empty(model.vocabulary_size, np.float32)
    with Context(model, 10_000.0, SETTINGS, 256, 2, CancelFlag()) as context:
        context.decode([BatchPart(0, 0, [1, 2, 3], output=True)], [row])
    return row


def test_the_functions_can_be_replaced_here() -> None:
    assert hook_obstacle() == ""


@pytest.mark.parametrize("make", [rope_hook, compute_hook, get_hook])
def test_the_last_user_puts_the_pointer_back(make: Any) -> None:
    hook = make()
    original = hook._pointer.function
    assert hook._pointer.read() == original
    with hook.held():
        with hook.held():
            assert hook.installed
        assert hook.installed
    assert hook._pointer.read() == original


def test_everybody_else_gets_the_original_function(model: Model) -> None:
    wanted = plain(model)
    actor = Counting()
    with rope_hook().held(), compute_hook().held():
        other: list[np.ndarray] = []
        with acting(actor):
            thread = threading.Thread(target=lambda: other.append(plain(model)))
            thread.start()
            thread.join()
        assert (actor.rotations, actor.graphs) == (0, 0)
        with acting(actor):
            mine = plain(model)
        assert actor.rotations >= 4
        assert actor.graphs >= 1
        after = actor.rotations
        np.testing.assert_array_equal(plain(model), wanted)
        assert actor.rotations == after
    np.testing.assert_array_equal(mine, wanted)
    np.testing.assert_array_equal(other[0], wanted)


def test_several_contexts_come_and_go_beside_plain_ones(model: Model) -> None:
    wanted = plain(model)

    def open_one() -> FusedContext:
        return FusedContext(model, BASES, SETTINGS, 10_000.0, 2, CancelFlag())

    first, second = open_one(), open_one()
    np.testing.assert_array_equal(plain(model), wanted)
    first.close()
    assert rope_hook().installed
    out = np.empty((1, 3, model.vocabulary_size), np.float32)
    second.compute([SlotPart(0, 0, [1, 2, 3])], range(3), out)
    second.close()
    second.close()
    assert not rope_hook().installed
    assert not compute_hook().installed
    np.testing.assert_array_equal(plain(model), wanted)


def test_opening_and_closing_in_many_threads_leaves_the_pointer_as_it_was() -> None:
    hook = rope_hook()

    def work() -> None:
        for _ in range(500):
            with hook.held():
                assert hook.installed

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not hook.installed
    assert hook._users == 0


def test_a_context_that_cannot_be_made_gives_the_function_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "buffer_alloc", lambda *_: 0)
    with pytest.raises(Exception, match="no memory for a small table"):
        FusedContext(model, BASES, SETTINGS, 10_000.0, 2, CancelFlag())
    assert not rope_hook().installed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_process_can_use_and_drop_what_it_inherits(model: Model) -> None:
    hook = rope_hook()
    # As if another thread were about to replace the function.
    with hook.held(), hook._lock:
        child = os.fork()
        if child == 0:
            with hook.held():
                inside = hook.installed
            hook.release()
            os._exit(0 if inside and not hook.installed and api.rope and address_of(api.rope) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert multiprocessing.active_children() == []


def test_a_process_that_ends_with_open_contexts_ends_well(tiny_model: Path) -> None:
    program = """
import sys
from pathlib import Path
import numpy as np
from abcli.config import ContextConfig
from abcli.native.llama import CancelFlag
from abcli.native.rotating.context import FusedContext, SlotPart
from tests.support.models import open_model
model = open_model(Path(sys.argv[1]))
context = FusedContext(model, (5e3, 1e4, 2e4), ContextConfig(context_size=256, threads=2), 1e4, 2, CancelFlag())
context.compute([SlotPart(0, 0, [1])], range(3), np.empty((1, 3, model.vocabulary_size), np.float32))
"""
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", program, str(tiny_model)], cwd=root, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_system_that_forbids_writing_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    from abcli.native.rotating import hook as module

    def forbidden(*_: object) -> None:
        raise PointerError("the system does not allow to write there")

    module._obstacle.cache_clear()
    monkeypatch.setattr(module.Pointer, "write", forbidden)
    try:
        assert hook_obstacle() == "the system does not allow to write there"
    finally:
        module._obstacle.cache_clear()
