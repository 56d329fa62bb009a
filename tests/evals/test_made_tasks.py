"""What holds for every task whose contexts are made up."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from abcli.errors import UsageError
from abcli.evals.kv import kv
from abcli.evals.needle import needle
from abcli.evals.questions import TaskSettings
from tests.evals.counting import count_pieces

Task = Callable[..., Any]
tasks = pytest.mark.parametrize("task", [kv, needle])


@tasks
def test_the_global_generator_is_neither_read_nor_moved(task: Task) -> None:
    random.seed(1)
    state = random.getstate()
    first = list(task(TaskSettings(800, 20), count_pieces))
    assert random.getstate() == state
    random.seed(2)
    assert list(task(TaskSettings(800, 20), count_pieces)) == first


@tasks
def test_few_measurements_are_made_per_context(task: Task) -> None:
    calls = []

    def count(text: str) -> int:
        calls.append(text)
        return count_pieces(text)

    questions = list(task(TaskSettings(4000, 80), count))
    assert len(calls) <= 12 * len({question.group for question in questions})


@tasks
@pytest.mark.parametrize("field", ["length", "limit", "depths"])
def test_settings_below_one_are_refused_at_once(task: Task, field: str) -> None:
    with pytest.raises(UsageError, match=field):
        task(TaskSettings(**{"length": 1000, "limit": 10, field: 0}), count_pieces)
