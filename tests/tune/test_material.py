"""What is learned from is never judged by, whatever it comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.chat.messages import Message
from abcli.errors import EvaluationDataError, UsageError
from abcli.evals.model_under_test import Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.questions import Question
from abcli.tune.material import Item, Sources, wrong_answers


class Prompts:
    """Reads four characters as a token."""

    def count(self, text: str) -> int:
        return len(text) // 4

    def tokenize(self, question: Question) -> TokenizedQuestion:
        return TokenizedQuestion(tuple(question.text.encode()), (tuple(question.answer.encode()),))

    def exchange(self, messages: Sequence[Message], answer: str) -> TokenizedQuestion:
        return TokenizedQuestion(tuple(messages[0].content.encode()), (tuple(answer.encode()),))


SUBJECT = cast(Subject, SimpleNamespace(prompts=Prompts()))


def contents(items: Sequence[Item]) -> set[tuple[object, ...]]:
    return {item.content for item in items}


def qa_file(path: Path, entries: int = 30) -> Path:
    lines = [
        {
            "question": f"Which {number}?",
            "answers": [f"thing {number:03}"],
            "ctxs": [
                {"title": f"T{number}", "text": f"It is thing {number:03}. {'word ' * 8}", "isgold": True},
                *({"title": f"D{n}", "text": f"Other {number} {n}. {'word ' * 8}", "isgold": False} for n in range(20)),
            ],
        }
        for number in range(entries)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize("task", ["needle", "kv", "qa"])
@pytest.mark.parametrize("times", [1, 2])
def test_no_question_is_on_both_sides(tmp_path: Path, task: str, times: int) -> None:
    sources = Sources(12, 9, seed=3, depths=3, qa=qa_file(tmp_path / "qa.jsonl"))
    learned = sources.learned(task, 400, SUBJECT)
    held = sources.held(task, times * 400, SUBJECT, learned)
    assert len(learned) >= 12
    assert len(held) >= 5
    assert not contents(learned) & contents(held)
    if times == 1:
        assert not {item.group for item in learned} & {item.group for item in held}


def test_a_seed_makes_other_questions() -> None:
    first, again, other = (Sources(6, 6, seed=seed).learned("kv", 400, SUBJECT) for seed in (0, 0, 1))
    assert first == again
    assert contents(first) != contents(other)


def test_tasks_without_data_cannot_be_asked() -> None:
    file = Path("file")
    assert Sources().has("needle")
    assert not Sources().has("qa")
    assert not Sources(tools=file).has("tools")
    assert Sources(qa=file, tools=file, tools_answers=file).has("tools")


def examples(path: Path, prompts: Sequence[str]) -> str:
    lines = ({"prompt": prompt, "answer": f"answer {number}"} for number, prompt in enumerate(prompts))
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


@given(
    prompts=st.lists(st.sampled_from([f"prompt {number}" for number in range(30)]), min_size=1, max_size=60),
    questions=st.integers(2, 40),
    held_out=st.integers(1, 40),
)
def test_examples_with_one_prompt_stay_together(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], questions: int, held_out: int
) -> None:
    task = examples(tmp_path_factory.mktemp("examples") / "file.jsonl", prompts)
    sources = Sources(questions, held_out)
    if len(set(prompts)) == 1:
        with pytest.raises(UsageError, match="none is left to judge by"):
            sources.learned(task, 100, SUBJECT)
        return
    learned = sources.learned(task, 100, SUBJECT)
    held = sources.held(task, 100, SUBJECT, learned)
    assert learned
    assert held
    assert not contents(learned) & contents(held)
    assert len(held) <= held_out
    assert len(learned) + len(held) >= min(len(prompts), len(learned) + held_out)


def test_an_example_that_is_too_long_is_named(tmp_path: Path) -> None:
    task = examples(tmp_path / "file.jsonl", ["short", "x" * 50])
    with pytest.raises(EvaluationDataError, match=r"line 2: it has 58 tokens, more than 40") as found:
        Sources().learned(task, 40, SUBJECT)
    assert "`length=58`" in found.value.hint


def test_wrong_answers_are_answers_of_others() -> None:
    items = Sources(10, 5).learned("kv", 400, SUBJECT)
    wrong = wrong_answers(items, 0)

    def answers(of: Sequence[Item]) -> list[Any]:
        return [item.question.continuations[0] for item in of]

    assert [item.question.prompt for item in wrong] == [item.question.prompt for item in items]
    assert sorted(answers(wrong)) == sorted(answers(items))
    assert all(one != other for one, other in zip(answers(wrong), answers(items), strict=True))
