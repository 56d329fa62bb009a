"""The task `qa`: a question on many documents, one of which answers it.

As in "Lost in the Middle" (Liu et al., arXiv 2307.03172); the data is in the format of its authors' files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from abcli.evals.data import ContextFiller, Record, read_records, shuffled, take_turns
from abcli.evals.placement import check_settings
from abcli.evals.questions import CountTokens, Question, TaskSettings

_MISSING = "qa needs a file of questions with their documents"
_HINT = (
    "give it with `data` FILE: JSON lines as in github.com/nelson-liu/lost-in-the-middle, such as its "
    "nq-open-oracle.jsonl.gz (scripts/fetch_evaluation_data.py fetches the data of the other tasks)"
)
_INSTRUCTION = "Answer the question with the help of the documents above, most of which have nothing to do with it."


@dataclass(frozen=True)
class Document:
    """A passage of an encyclopaedia, each part on one line."""

    title: str
    text: str

    def holds(self, answers: Sequence[str]) -> bool:
        """Whether one of the case-folded `answers` stands in it."""
        folded = f"{self.title}\n{self.text}".casefold()
        return any(answer in folded for answer in answers)


@dataclass(frozen=True)
class _Entry:
    """A line of the data: the question, the document it needs, and documents that only look as if they answered it."""

    line: int
    question: str
    answer: str
    accepted: tuple[str, ...]
    """All accepted answers, case-folded."""
    gold: Document
    distractors: tuple[Document, ...]


def qa(settings: TaskSettings, count: CountTokens) -> Iterator[Question]:
    """Questions on documents, of which one, at the asked depth, holds the answer; each has its own context.

    The distractors are the line's own other documents, then the documents that other questions need; none holds an
    accepted answer. Raises UsageError for settings that make no sense and EvaluationDataError for the data.
    """
    check_settings(settings)
    entries = [_entry(record) for record in read_records(settings.data, _MISSING, _HINT)]
    pool = list(dict.fromkeys(entry.gold for entry in entries))
    filler = ContextFiller(render, count, settings.length)

    def make(entry: _Entry, depth: float, identifier: str) -> Question | None:
        seed = f"qa/{settings.seed}/{entry.line}"
        filled = filler.fill(entry.gold, _others(entry, pool, seed), depth, seed)
        if filled is None:
            return None
        return Question(
            identifier=identifier,
            group=identifier,
            context=filled.context,
            text=f"{_INSTRUCTION}\nQuestion: {entry.question}",
            answer_start="The answer is",
            answer=f" {entry.answer}",
            depth=filled.depth,
            length=settings.length,
        )

    return iter(take_turns("qa", settings, shuffled(entries, f"qa/{settings.seed}"), make))


def render(documents: Sequence[Document]) -> str:
    """The text of a context."""
    return "\n".join(
        f"Document [{number}](Title: {document.title}) {document.text}"
        for number, document in enumerate(documents, start=1)
    )


def spelling_in(passage: str, answers: Sequence[str]) -> str | None:
    """The first of `answers` that stands in `passage`, whatever its case, as it is spelt there.

    One that stands there as words of their own goes before one that is only part of a word.
    """
    for pattern in (r"(?<!\w){}(?!\w)", "{}"):
        for answer in answers:
            if found := re.search(pattern.format(re.escape(answer)), passage, re.IGNORECASE):
                return found.group()
    return None


def _others(entry: _Entry, pool: Sequence[Document], seed: str) -> Iterator[Document]:
    """Documents to put around the needed one, the best first, none twice."""
    for document in dict.fromkeys((*entry.distractors, *shuffled(pool, f"{seed}/others"))):
        if document != entry.gold and not document.holds(entry.accepted):
            yield document


def _entry(record: Record) -> _Entry:
    answers = [_one_line(answer) for answer in record.texts("answers")]
    parts = record.records("ctxs")
    documents = [Document(_one_line(part.text("title")), _one_line(part.text("text"))) for part in parts]
    golden = [part.truth("isgold") for part in parts]
    # The authors' search for answers is more thorough than `holds`: their word is taken.
    answering = [part.truth("hasanswer", default=False) for part in parts]
    if not any(golden):
        raise record.error("none of ctxs is marked with isgold")
    gold = documents[golden.index(True)]
    answer = spelling_in(gold.text, answers)
    if answer is None:
        raise record.error(f"the needed document has none of the answers ({answers[0]!r})")
    return _Entry(
        line=record.line,
        question=_one_line(record.text("question")),
        answer=answer,
        accepted=tuple(answer.casefold() for answer in answers),
        gold=gold,
        distractors=tuple(
            document
            for document, is_gold, answers_it in zip(documents, golden, answering, strict=True)
            if not is_gold and not answers_it
        ),
    )


def _one_line(text: str) -> str:
    """`text` with composed characters and single spaces, so that an answer is found however a passage is set."""
    return " ".join(unicodedata.normalize("NFC", text).split())
