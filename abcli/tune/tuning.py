"""Runs a tuning: makes the questions, learns the gains in torch, and judges them in llama.cpp."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from abcli.chat.messages import Message
from abcli.config import Buckets, ContextConfig, Gains
from abcli.errors import UnsupportedModelError, UsageError
from abcli.evals.model_under_test import Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.runner import EvaluationSettings, make_questions
from abcli.llm import LLM
from abcli.prepare import Prepared
from abcli.text import StageProgress
from abcli.tune.batches import contexts, text_rows
from abcli.tune.everyday import prompts, prose
from abcli.tune.guard import make_guards
from abcli.tune.training import Learner, Step, TrainingSettings
from abcli.tune.twin import Twin

# Questions of `abcli eval` and `calibrate` have small seeds: these are others.
_TRAINING_SEED = 1_000_003
_ANSWER_TOKENS = 120
_GUARD_TOKENS = 256
# Nats per token between the twin and llama.cpp. llama.cpp rounds activations too, which costs up to 0.1 (Q4_K).
_LARGEST_TWIN_DIVERGENCE = 0.2
_TWIN_PROMPTS = 20
# For longer rows every layer is computed a second time instead of being kept.
_KEPT_TOKENS = 2048


@dataclass(frozen=True)
class TuningSettings:
    """What is learned from, and for how long."""

    tasks: tuple[str, ...] = ("needle", "kv")
    length: int = 1024
    questions: int = 320
    """To learn from, of each task."""
    held_out: int = 200
    """To judge by, of each task and length."""
    seed: int = 0
    depths: int = 5
    data: Path | None = None
    answers: Path | None = None
    steps: int = 60
    minutes: float = 60.0
    contexts: int = 8
    guard_weight: float = 1.0

    def asked(self, task: str, length: int, *, training: bool) -> EvaluationSettings:
        """Questions of a task; those to learn from and those to judge by differ in every context."""
        needs = task in ("qa", "tools")
        return EvaluationSettings(
            task,
            (length,),
            self.questions if training else self.held_out,
            self.seed + (_TRAINING_SEED if training else 0),
            self.depths,
            self.data if needs else None,
            self.answers if task == "tools" else None,
        )

    def training(self, *, frugal: bool) -> TrainingSettings:
        """The same as the learner takes it."""
        seconds = self.minutes * 60
        return TrainingSettings(self.steps, seconds, self.contexts, self.guard_weight, self.seed, frugal)


@dataclass(frozen=True)
class Reply:
    """A prompt's tokens, and the greedy answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Learned:
    """Gains, and how they came about."""

    gains: Gains
    steps: tuple[Step, ...]
    twin_divergence: float
    """Mean nats per token between the twin and llama.cpp."""


def learn(
    settings: TuningSettings,
    subject: Subject,
    device: torch.device,
    directory: Path | None,
    on_progress: StageProgress = lambda _what, _done, _all: None,
) -> Learned:
    """Learn gains for the model of `subject`; with `directory`, the same call goes on where it stopped.

    Raises UnsupportedModelError for a model whose twin is not like it, and what making questions raises.
    """
    groups = _questions(settings, subject)
    with opened(subject, ()) as llm:
        guarded = prompts().guard
        what = "answering everyday prompts"
        chats = answered(llm, guarded, lambda done: on_progress(what, done, len(guarded)))
        texts = [llm.tokenize(text)[: _GUARD_TOKENS + 1] for text in prose().guard]
        on_progress("loading the model into torch", 0, 1)
        twin = Twin(subject.checked, device)
        divergence = twin_divergence(twin, llm, [chat.prompt for chat in chats[:_TWIN_PROMPTS]])
        on_progress("loading the model into torch", 1, 1)
    if not divergence <= _LARGEST_TWIN_DIVERGENCE:
        raise UnsupportedModelError(
            f"{subject.checked.name} computes otherwise in torch: {divergence:.3f} nats per token from llama.cpp",
            "report it with the model",
        )
    guards = [
        make_guards(twin, texts, [1] * len(texts)),
        make_guards(
            twin,
            [chat.prompt + chat.tokens for chat in chats if chat.tokens],
            [len(c.prompt) for c in chats if c.tokens],
        ),
    ]
    training = settings.training(frugal=max(len(group[0].prompt) for group in groups) > _KEPT_TOKENS)
    steps: list[Step] = []

    def note(step: Step) -> None:
        steps.append(step)
        loss, kept = step.loss, max(step.divergences)
        on_progress(f"learning (loss {loss:.3f}, guard {kept:.4f})", round(step.share * 1000), 1000)

    file = None if directory is None else directory / f"{_key(settings, subject)}.pt"
    gains = Learner(twin, training, file).learn(groups, guards, note)
    return Learned(gains, tuple(steps), divergence)


def opened(subject: Subject, gains: Gains) -> LLM:
    """The model of `subject` with gains and one bucket, for short texts in several slots."""
    context = ContextConfig(
        context_size=1024,
        slots=8,
        threads=subject.config.threads,
        flash_attention=subject.config.flash_attention,
        engine="contexts",
    )
    buckets = Buckets((subject.native_base,), subject.native_base)
    return LLM(Prepared(subject.checked.with_gains(gains), context, buckets))


def answered(llm: LLM, asked: Sequence[str], on_done: Callable[[int], object] | None = None) -> list[Reply]:
    """The greedy answers to everyday prompts, the first tokens of them."""
    answers = llm.generate_many(asked, temperature=0.0, max_tokens=_ANSWER_TOKENS, on_done=on_done)
    return [
        Reply(tuple(llm.prompt_tokens([Message("user", text)])), answer.tokens, answer.text)
        for text, answer in zip(asked, answers, strict=True)
    ]


def twin_divergence(twin: Twin, llm: LLM, tokens: Sequence[Sequence[int]]) -> float:
    """The mean Kullback-Leibler divergence (nats) of the twin from llama.cpp after the last of each tokens."""
    found = []
    for prompt in tokens:
        rows, _ = text_rows([prompt], [1])
        wanted = torch.tensor([[0, len(prompt) - 1]], device=twin.device)
        with torch.no_grad():
            other = twin.logits(rows.to(twin.device), None, wanted)[0].log_softmax(-1).double().cpu().numpy()
        own = llm.logits(prompt)[0].astype(np.float64)
        own -= np.logaddexp.reduce(own)
        found.append(float((np.exp(own) * (own - other)).sum()))
    return float(np.mean(found))


def _questions(settings: TuningSettings, subject: Subject) -> list[list[TokenizedQuestion]]:
    """The contexts of all tasks in turn, as many of each."""
    by_task = []
    for task in settings.tasks:
        questions = make_questions(settings.asked(task, settings.length, training=True), subject)
        by_task.append(contexts(questions, [subject.prompts.tokenize(question) for question in questions]))
    fewest = min(map(len, by_task))
    if fewest < 2:
        raise UsageError("there is one context to learn from", "ask for more `questions`")
    return [groups[index] for index in range(fewest) for groups in by_task]


def _key(settings: TuningSettings, subject: Subject) -> str:
    """What a file of half-learned gains is good for."""
    text = repr((subject.checked.fingerprint, replace(settings, held_out=0)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
