"""Learns a tuning for a model: makes the questions, checks its twin in torch, and learns, and learns controls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from abcli.config import UNTUNED, Tuning
from abcli.engine.workers import available_cores
from abcli.errors import UnsupportedModelError, UsageError
from abcli.evals.model_under_test import Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.llm import LLM
from abcli.text import StageProgress
from abcli.tune.batches import contexts, largest_row, text_rows
from abcli.tune.devices import free_bytes
from abcli.tune.everyday import ANSWER_TOKENS, answered, opened, prompts, prose
from abcli.tune.guard import Guard
from abcli.tune.material import Item, wrong_answers
from abcli.tune.memory import LearningMemory, plan_memory
from abcli.tune.settings import Learned, Step, TrainingSettings, TuningSettings
from abcli.tune.training import Learner
from abcli.tune.twin import Heads, Twin

ONE_FOR_ALL = "the same for all heads"
WRONG_ANSWERS = "learned from wrong answers"
_GUARD_TOKENS = 256
# Nats per token. llama.cpp rounds what it multiplies with quantised weights: 0.0044 (SmolLM2, Q4_1) and 0.0076 (Gemma 3
# 270M, Q4_K_M) lie between it and the twin, as many as between it and itself with the same weights as F32.
_LARGEST_TWIN_DIVERGENCE = 0.05
_TWIN_PROMPTS = 20


@dataclass(frozen=True)
class Listener:
    """Whom learning tells how far it is."""

    progress: StageProgress = lambda _what, _done, _all: None
    memory: Callable[[LearningMemory], None] = lambda _memory: None
    step: Callable[[str, Step], None] = lambda _what, _step: None


def learn(
    settings: TuningSettings,
    subject: Subject,
    device: torch.device,
    directory: Path | None,
    listener: Listener = Listener(),
) -> Learned:
    """Learn a tuning for the model of `subject`; with `directory`, the same call goes on where it stopped.

    Raises UnsupportedModelError for a model whose twin is not like it, OutOfMemoryError before anything is computed,
    and what making questions raises.
    """
    items = {task: settings.sources.learned(task, settings.length, subject) for task in settings.tasks}
    groups = _in_turn(items)
    tokens, wanted = largest_row(groups)
    everyday = _GUARD_TOKENS + ANSWER_TOKENS
    memory = plan_memory(subject.checked, max(tokens, everyday), max(wanted, _GUARD_TOKENS), free_bytes(device))
    listener.memory(memory)
    torch.set_num_threads(subject.config.threads or available_cores())
    twin, guards, divergence = _twin_and_guards(settings, subject, device, listener.progress)

    def learned(what: str, groups: list[list[TokenizedQuestion]], training: TrainingSettings) -> tuple[Tuning, Learner]:
        file = None
        if directory is not None:
            others = [[guard.text for guard in kind] for kind in guards]
            key = repr((subject.checked.fingerprint, device.type, training, groups, others))
            file = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        learner = Learner(twin, training, file, frugal=memory.frugal)

        def told(step: Step) -> None:
            listener.progress(what, round(step.share * 1000), 1000)
            listener.step(what, step)

        return learner.learn(groups, guards, told), learner

    tuning, learner = learned("learning", groups, settings.training)
    controls = {}
    if settings.controls:
        wrong = _in_turn({task: wrong_answers(of, settings.sources.seed) for task, of in items.items()})
        single = replace(settings.training, single=True)
        controls[ONE_FOR_ALL] = learned(f"control: {ONE_FOR_ALL}", groups, single)[0]
        controls[WRONG_ANSWERS] = learned(f"control: {WRONG_ANSWERS}", wrong, settings.training)[0]
    return Learned(tuning, tuple(learner.steps), divergence, items, controls)


def twin_divergence(twin: Twin, llm: LLM, tokens: Sequence[Sequence[int]]) -> float:
    """The mean Kullback-Leibler divergence (nats) of the twin from llama.cpp after the last of each tokens."""
    found = []
    for prompt in tokens:
        rows, _ = text_rows([prompt], [1])
        wanted = torch.tensor([[0, len(prompt) - 1]], device=twin.device)
        with torch.no_grad():
            other = twin.logits(rows.to(twin.device), Heads(), wanted)[0].log_softmax(-1).cpu().double().numpy()
        own = llm.logits(prompt)[0].astype(np.float64)
        own -= np.logaddexp.reduce(own)
        found.append(float((np.exp(own) * (own - other)).sum()))
    return float(np.mean(found))


def _twin_and_guards(
    settings: TuningSettings, subject: Subject, device: torch.device, on_progress: StageProgress
) -> tuple[Twin, list[list[Guard]], float]:
    """The twin, checked against llama.cpp, and two kinds of guards: prose, and answers to everyday prompts."""
    guarded, passages = prompts().guard, prose(settings.text).guard
    with opened(subject, UNTUNED) as llm:
        what = "answering everyday prompts"
        chats = answered(subject, llm, guarded, lambda done: on_progress(what, done, len(guarded)))
        texts = [llm.tokenize(text)[: _GUARD_TOKENS + 1] for text in passages]
        on_progress("loading the model into torch", 0, 1)
        twin = Twin(subject.checked, device)
        divergence = twin_divergence(twin, llm, [chat.prompt for chat in chats[:_TWIN_PROMPTS]])
        on_progress("loading the model into torch", 1, 1)
    if not divergence <= _LARGEST_TWIN_DIVERGENCE:
        raise UnsupportedModelError(
            f"{subject.checked.name} computes otherwise in torch: {divergence:.3f} nats per token from llama.cpp",
            "report it with the model",
        )
    guards = [[Guard(twin, text) for text in texts if len(text) > 1]]
    if said := [Guard(twin, chat.prompt + chat.tokens, len(chat.prompt), own=True) for chat in chats if chat.tokens]:
        guards.append(said)
    return twin, guards, divergence


def _in_turn(items: Mapping[str, Sequence[Item]]) -> list[list[TokenizedQuestion]]:
    """The contexts of all tasks in turn, as many of each."""
    by_task = [contexts(of) for of in items.values()]
    fewest = min(map(len, by_task))
    if fewest < 2:
        raise UsageError("there is one context to learn from", "ask for more `questions`")
    return [groups[index] for index in range(fewest) for groups in by_task]
