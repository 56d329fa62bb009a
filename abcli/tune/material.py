"""What is learned from and what is judged by: questions of `eval`'s tasks, or a user's examples, never both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from abcli.errors import UsageError
from abcli.evals.data import shuffled
from abcli.evals.model_under_test import Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.questions import end_of_context
from abcli.evals.runner import TASKS, EvaluationSettings, make_questions
from abcli.tune.examples import Example, read_examples


@dataclass(frozen=True)
class Item:
    """One thing to answer, and where it stands: `group` names its context, `depth` is 0 to 1."""

    group: str
    depth: float
    length: int
    content: tuple[object, ...]
    """What makes it another one."""
    question: TokenizedQuestion


@dataclass(frozen=True)
class Sources:
    """How many questions there are, and the files behind some tasks."""

    questions: int = 320
    """To learn from, of each task."""
    held_out: int = 200
    """To judge by, of each task and length."""
    seed: int = 0
    depths: int = 5
    qa: Path | None = None
    tools: Path | None = None
    tools_answers: Path | None = None
    answers: Path | None = None
    """Of a file of prompts."""

    def has(self, task: str) -> bool:
        """Whether a task of `eval`'s can be asked."""
        needed = {"qa": (self.qa,), "tools": (self.tools, self.tools_answers)}.get(task, ())
        return None not in needed

    def learned(self, task: str, length: int, subject: Subject) -> list[Item]:
        """What to learn a task from: whole contexts. Raises UsageError, EvaluationDataError and PromptError."""
        if task not in TASKS:
            return self._examples(Path(task), length, subject)[0]
        items = self._asked(task, length, self.questions + self.held_out, subject)
        return items[: end_of_context([item.group for item in items], self.questions)]

    def held(self, task: str, length: int, subject: Subject, learned: Sequence[Item] = ()) -> list[Item]:
        """What to judge a task by: `held_out` items, none of which is among those `learned`. Raises the same."""
        if task not in TASKS:
            return self._examples(Path(task), length, subject)[1]
        known = {item.content for item in learned}
        items = self._asked(task, length, (self.questions if learned else 0) + self.held_out, subject)
        return [item for item in items if item.content not in known][-self.held_out :]

    def _asked(self, task: str, length: int, count: int, subject: Subject) -> list[Item]:
        data = {"qa": self.qa, "tools": self.tools}.get(task)
        settings = EvaluationSettings(
            task,
            (length,),
            count,
            self.seed,
            self.depths,
            data,
            self.tools_answers if task == "tools" else None,
        )
        return [
            Item(asked.group, asked.depth, length, (asked.text, asked.answer), subject.prompts.tokenize(asked))
            for asked in make_questions(settings, subject)
        ]

    def _examples(self, path: Path, length: int, subject: Subject) -> tuple[list[Item], list[Item]]:
        """Those to learn from and those to judge by, in the same proportion where there are fewer than asked for.

        One prompt with several answers is on one side.
        """
        groups: dict[tuple[int, ...], list[TokenizedQuestion]] = {}
        for example in shuffled(read_examples(path, self.answers), f"examples/{self.seed}"):
            question = _tokenized(example, length, subject)
            groups.setdefault(question.prompt, []).append(question)
        items = [
            Item(f"{path.name}/{number}", 1.0, length, prompt, question)
            for number, (prompt, questions) in enumerate(groups.items())
            for question in questions
        ]
        cut = self.questions
        if len(items) < self.questions + self.held_out:
            cut = round(len(items) * self.questions / (self.questions + self.held_out))
        # At least one prompt is left to judge by.
        contexts = [item.group for item in items]
        cut = min(end_of_context(contexts, max(cut, 1)), len(items) - contexts.count(contexts[-1]))
        if cut == 0:
            raise UsageError(
                f"all examples in {path} have one prompt: none is left to judge by", "give other ones, too"
            )
        return items[:cut], items[cut : cut + self.held_out]


def wrong_answers(items: Sequence[Item], seed: int) -> list[Item]:
    """The same questions, each with the right answer of another one: what can be learned from them is form alone."""
    order = list(range(len(items)))
    Random(f"wrong/{seed}").shuffle(order)  # noqa: S311
    taken = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [
        replace(item, question=TokenizedQuestion(item.question.prompt, items[taken[place]].question.continuations[:1]))
        for place, item in enumerate(items)
    ]


def _tokenized(example: Example, length: int, subject: Subject) -> TokenizedQuestion:
    question = subject.prompts.exchange(example.messages, example.answer)
    used = len(question.prompt) + len(question.continuations[0])
    if used > length:
        hint = f"ask for `length={used}`, or remove the line"
        raise example.record.error(f"it has {used:,} tokens, more than {length:,}", hint)
    return question
