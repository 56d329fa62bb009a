"""llama.cpp's log, which comes through a callback of ctypes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from abcli.native.llama import echo_log
from tests.support.engines import fused_engine
from tests.support.models import open_model, set_up


@pytest.fixture
def interrupting() -> Iterator[None]:
    """Ctrl-C arrives while llama.cpp logs, once."""
    left = [KeyboardInterrupt()]

    def press(_text: str) -> None:
        if left:
            raise left.pop()

    echo_log(press)
    yield
    echo_log(None)


def test_an_interrupt_while_a_model_loads_is_not_lost(tiny_model: Path, interrupting: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_model(tiny_model)
    with open_model(tiny_model) as model:
        assert model.vocabulary_size > 0


def test_nor_is_one_while_a_context_is_made(tiny_model: Path, request: pytest.FixtureRequest) -> None:
    settings = set_up((10_000.0, 20_000.0), context_size=256)
    with open_model(tiny_model) as model:
        request.getfixturevalue("interrupting")
        with pytest.raises(KeyboardInterrupt):
            fused_engine(model, *settings)
        with fused_engine(model, *settings) as engine:
            assert engine.prefill(0, [1, 2]).shape == (2, model.vocabulary_size)
