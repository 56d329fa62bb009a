"""What a tuned model should still say as before: prose in the public domain, and what people ask every day.

The prose is the beginning of Alice's Adventures in Wonderland, Pride and Prejudice, Moby-Dick, A Tale of Two Cities,
A Scandal in Bohemia, Walden, Frankenstein, Dracula, Adventures of Huckleberry Finn, On the Origin of Species, The War
of the Worlds and Little Women.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from abcli.chat.messages import Message
from abcli.config import Buckets, ContextConfig, Tuning
from abcli.errors import EvaluationDataError
from abcli.evals.model_under_test import Subject
from abcli.evals.prose import read_sentences
from abcli.llm import LLM
from abcli.prepare import Prepared

ANSWER_TOKENS = 120
_CONTEXT = 1024

# A sequence of so many tokens that comes so often is no way to talk.
_REPEATED_TOKENS = 12
_REPETITIONS = 3
# Of a passage of the user's own prose, about 250 tokens, and of all of them.
_PASSAGE_CHARACTERS = 1200
_FEWEST_PASSAGES, _MOST_PASSAGES = 4, 48


@dataclass(frozen=True)
class Halves:
    """Texts to guard by while learning, and others to check with at the end."""

    guard: tuple[str, ...]
    check: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """A prompt's tokens, and the greedy answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def prose(path: Path | None = None) -> Halves:
    """Passages of books, 150 to 250 words each, or of the text in the file or directory `path`.

    Raises EvaluationDataError for a text that cannot be read or is too short.
    """
    passages = _read("prose.txt").split("\n\n") if path is None else _passages(path)
    return Halves(tuple(passages[0::2]), tuple(passages[1::2]))


def prompts() -> Halves:
    """A hundred everyday questions and requests."""
    lines = _read("prompts.txt").splitlines()
    return Halves(tuple(lines[0::2]), tuple(lines[1::2]))


def repeats_itself(tokens: tuple[int, ...]) -> bool:
    """Whether an answer says the same twelve tokens three times or more."""
    windows = zip(*(tokens[start:] for start in range(_REPEATED_TOKENS)), strict=False)
    return any(count >= _REPETITIONS for count in Counter(windows).values())


def opened(subject: Subject, tuning: Tuning) -> LLM:
    """The model of `subject`, tuned, with one bucket, for short texts in several slots."""
    context = ContextConfig(
        context_size=min(_CONTEXT, subject.model.trained_context),
        slots=8,
        threads=subject.config.threads,
        flash_attention=subject.config.flash_attention,
        engine="contexts",
    )
    buckets = Buckets((subject.native_base,), subject.native_base)
    prepared = Prepared(subject.checked.with_tuning(tuning), context, buckets)
    return LLM(prepared, chat_template=subject.chat_template)


def answered(
    subject: Subject, llm: LLM, asked: Sequence[str], on_done: Callable[[int], object] = lambda _done: None
) -> list[Reply]:
    """The greedy answers to everyday prompts, the first tokens of them; a model without a chat template reads text."""
    raw = not subject.prompts.chats
    texts = [f"{text}\n" for text in asked] if raw else asked
    answers = llm.generate_many(texts, raw=raw, temperature=0.0, max_tokens=ANSWER_TOKENS, on_done=on_done)
    return [
        Reply(tuple(llm.prompt_tokens(text if raw else [Message("user", text)], raw=raw)), answer.tokens, answer.text)
        for text, answer in zip(texts, answers, strict=True)
    ]


def _passages(path: Path) -> list[str]:
    """Passages that are spread over the whole text."""
    passages = [""]
    for sentence in read_sentences(path):
        if len(passages[-1]) >= _PASSAGE_CHARACTERS:
            passages.append("")
        passages[-1] = f"{passages[-1]} {sentence}".lstrip()
    if len(passages) < _FEWEST_PASSAGES:
        raise EvaluationDataError(
            f"{path} has {sum(map(len, passages)):,} characters in sentences",
            f"give at least {_FEWEST_PASSAGES * _PASSAGE_CHARACTERS:,}, or leave `text` out",
        )
    step = max(1, len(passages) // _MOST_PASSAGES)
    return passages[::step][:_MOST_PASSAGES]


def _read(name: str) -> str:
    return files("abcli.tune").joinpath(name).read_text("utf-8").strip()
