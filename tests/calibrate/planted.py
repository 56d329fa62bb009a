"""Made-up traces, and a subject that answers with them, so that it is known which bases are good at what."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from abcli.config import ContextConfig, ModelConfig
from abcli.evals.model_under_test import Prefill
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.questions import Question
from abcli.evals.traces import Node, Trace

NATIVE_BASE = 10_000.0
VOCABULARY = 24


def node(logits: np.ndarray, tokens: Sequence[int] | None = None) -> Node:
    """What a trace keeps of `logits` [bases, vocabulary]; `tokens` are those that are kept, default all."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    entropies = -(np.exp(log_probabilities) * log_probabilities).sum(axis=1)
    kept = np.arange(logits.shape[1]) if tokens is None else np.array(sorted(set(tokens)))
    return Node(kept.astype(np.int32), log_probabilities[:, kept].astype(np.float32), entropies.astype(np.float32))


def kept_tokens(logits: np.ndarray, gold: int, each: int) -> list[int]:
    """Each base's `each` likeliest tokens and the right one, as a trace keeps them."""
    return [gold, *np.argsort(-logits, axis=1)[:, :each].ravel().tolist()]


def random_answers(
    seed: int, bases: int, questions: int = 12, longest: int = 4, scale: float = 2.0
) -> list[list[tuple[np.ndarray, int]]]:
    """For each question its answer's (logits float32 [bases, vocabulary], right token) one after the other."""
    random = np.random.default_rng(seed)
    return [
        [
            ((scale * random.standard_normal((bases, VOCABULARY))).astype(np.float32), int(random.integers(VOCABULARY)))
            for _ in range(random.integers(1, longest + 1))
        ]
        for _ in range(questions)
    ]


def as_traces(answers: list[list[tuple[np.ndarray, int]]], bases: Sequence[float], each: int | None) -> list[Trace]:
    """The traces of `answers`; of every base `each` tokens are kept, None for all."""
    return [
        Trace(
            tuple(bases),
            tuple(node(logits, None if each is None else kept_tokens(logits, gold, each)) for logits, gold in answer),
            (tuple((number, gold) for number, (_, gold) in enumerate(answer)),),
        )
        for answer in answers
    ]


# (multiple of the native base, multiple of the prefill base, depth) -> added to the right token's logit
Strength = Callable[[float, float, float], float]


@dataclass
class PlantedSubject:
    """Answers as `strength` says, with noise that depends on question and base alone."""

    strength: Strength
    noise: float = 0.3
    prefill_noise: float = 0.0
    """Added to the right token's logit, another number for every question and prefill base."""

    def __post_init__(self) -> None:
        self.native_base = NATIVE_BASE
        self.checked = SimpleNamespace(
            name="planted.gguf",
            fingerprint="0123456789abcdef" * 4,
            config=ModelConfig(Path("planted.gguf")),
            header=SimpleNamespace(architecture="llama", native_base=NATIVE_BASE),
        )
        self.config = ContextConfig()
        self.prompts: Any = self
        self.asked: list[Question] = []
        self.calls: list[tuple[int, tuple[float, ...], Prefill]] = []

    def count(self, text: str) -> int:
        return len(text) // 3

    def tokenize(self, question: Question) -> TokenizedQuestion:
        self.asked.append(question)
        gold = zlib.crc32(question.identifier.encode())
        return TokenizedQuestion((len(self.asked) - 1,), ((gold % VOCABULARY, gold // VOCABULARY % VOCABULARY),))

    def prefill(self, mode: str, base: float | None) -> Prefill:
        return Prefill("exact", NATIVE_BASE) if mode == "exact" else Prefill("shared", base or NATIVE_BASE)

    def trace(
        self,
        questions: Sequence[TokenizedQuestion],
        bases: Sequence[float],
        prefill: Prefill,
        on_progress: Callable[[int, int], None],
    ) -> list[Trace]:
        ordered = tuple(sorted(set(bases)))
        self.calls.append((len(questions), ordered, prefill))
        on_progress(len(questions), len(questions))
        return [self._trace(question, ordered, prefill) for question in questions]

    def _trace(self, item: TokenizedQuestion, bases: tuple[float, ...], prefill: Prefill) -> Trace:
        question = self.asked[item.prompt[0]]
        nodes = []
        changes = np.random.default_rng([zlib.crc32(question.identifier.encode()), int(prefill.base)])
        for place, gold in enumerate(item.continuations[0]):
            rows = []
            for base in bases:
                random = np.random.default_rng([zlib.crc32(question.identifier.encode()), int(base), place])
                row = self.noise * random.standard_normal(VOCABULARY)
                row[gold] += self.strength(base / NATIVE_BASE, prefill.base / NATIVE_BASE, question.depth)
                row[gold] += self.prefill_noise * changes.standard_normal()
                rows.append(row)
            nodes.append(node(np.array(rows, np.float32)))
        return Trace(bases, tuple(nodes), (tuple(enumerate(item.continuations[0])),))
