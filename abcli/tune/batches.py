"""Questions and texts as rows for the twin: all questions on one context follow it in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from abcli.evals.prompts import TokenizedQuestion
from abcli.generate import common_prefix
from abcli.tune.material import Item
from abcli.tune.twin import Rows


@dataclass(frozen=True)
class Asked:
    """Rows, and what should come after some of their tokens: `wanted` int64 [n, 2] (row, place), `gold` int64 [n].

    `question` int64 [n] numbers the question that each belongs to.
    """

    rows: Rows
    wanted: Tensor
    gold: Tensor
    question: Tensor

    def to(self, device: torch.device) -> Asked:
        """The same on another device."""
        return Asked(self.rows.to(device), *(part.to(device) for part in (self.wanted, self.gold, self.question)))

    def loss(self, logits: Tensor) -> Tensor:
        """The mean over questions of the mean negative log-likelihood of their tokens; `logits` [n, vocabulary]."""
        losses = torch.nn.functional.cross_entropy(logits, self.gold, reduction="none")
        counts = torch.bincount(self.question)
        return (losses / counts[self.question]).sum() / len(counts)


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    positions: list[int]
    segments: list[int]
    wanted: list[tuple[int, int, int]]
    """Place, the token that should follow, and the number of the question in the row."""


def contexts(items: Sequence[Item]) -> list[list[TokenizedQuestion]]:
    """The questions by context, in order."""
    return [[item.question for item in group] for _, group in groupby(items, key=lambda item: item.group)]


def largest_row(groups: Sequence[Sequence[TokenizedQuestion]]) -> tuple[int, int]:
    """The most tokens of a row, and the most that are asked for in one."""
    rows = [_row(group) for group in groups]
    return max(len(row.tokens) for row in rows), max(len(row.wanted) for row in rows)


def asked_rows(groups: Sequence[Sequence[TokenizedQuestion]]) -> Asked:
    """A row for each context, with the right answers of all its questions."""
    made = [_row(group) for group in groups]
    wanted: list[tuple[int, int]] = []
    gold: list[int] = []
    question: list[int] = []
    for number, row in enumerate(made):
        before = question[-1] + 1 if question else 0
        for place, token, index in row.wanted:
            wanted.append((number, place))
            gold.append(token)
            question.append(before + index)
    return Asked(
        _filled([(row.tokens, row.positions, row.segments) for row in made]),
        torch.tensor(wanted),
        torch.tensor(gold),
        torch.tensor(question),
    )


def text_rows(texts: Sequence[Sequence[int]], begins: Sequence[int]) -> tuple[Rows, Tensor]:
    """A row for each text, and `wanted` for all its tokens from number `begins` on but the last."""
    rows = _filled([(list(text), list(range(len(text))), [0] * len(text)) for text in texts])
    places = [
        (row, place)
        for row, (text, begin) in enumerate(zip(texts, begins, strict=True))
        for place in range(max(0, begin - 1), len(text) - 1)
    ]
    return rows, torch.tensor(places)


def _row(group: Sequence[TokenizedQuestion]) -> _Row:
    prompts = [item.prompt for item in group]
    shared = len(prompts[0]) - 1
    for prompt in prompts:
        # The last token of each prompt is its own: what follows it is asked for.
        shared = min(shared, common_prefix(prompts[0], prompt), len(prompt) - 1)
    row = _Row(list(prompts[0][:shared]), list(range(shared)), [0] * shared, [])
    for index, item in enumerate(group):
        answer = item.continuations[0]
        own = [*item.prompt[shared:], *answer[:-1]]
        first = len(row.tokens) + len(item.prompt) - shared - 1
        row.wanted.extend((first + at, token, index) for at, token in enumerate(answer))
        row.tokens.extend(own)
        row.positions.extend(range(shared, shared + len(own)))
        row.segments.extend([index + 1] * len(own))
    return row


def _filled(rows: Sequence[tuple[list[int], list[int], list[int]]]) -> Rows:
    """Rows of one length, filled up with what nothing sees."""
    length = max(len(tokens) for tokens, _, _ in rows)

    def tensor(part: int, filler: int) -> Tensor:
        return torch.tensor([row[part] + [filler] * (length - len(row[part])) for row in rows])

    return Rows(tensor(0, 0), tensor(1, 0), tensor(2, -1))
