"""`abcli diff`: the answers of one bucket, the default set and the model's profile to one prompt, side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from abcli.cli._chat_options import ChatFlags
from abcli.cli._options import AnswerOptions, ModelOptions, SamplingOptions
from abcli.cli._prompt_options import PromptOptions, PromptWords, Question, answered
from abcli.cli._setup import opened
from abcli.config import BucketConfig
from abcli.errors import UsageError
from abcli.llm import LLM
from abcli.prepare import Prepared, prepare
from abcli.profiles.profile import NO_PROFILE
from abcli.rope.bases import nearest_base
from abcli.trace.difference import parting
from abcli.trace.recorder import Recorder, texts
from abcli.ui.difference import Compared, show_answers
from abcli.ui.terminal import Terminal

_PLAIN_WIDTH = 120


def diff(
    words: PromptWords = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of columns.")] = False,
    prompt_options: PromptOptions,
    model_options: ModelOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
    chat_flags: ChatFlags,
) -> None:
    """Answer one prompt with each set of buckets, and show where the answers part."""
    generation = answer_options.config(sampling_options.config())
    question = prompt_options.question(words or [], model_options.model, answer_options, chat_flags, generation)
    terminal = Terminal()
    answers: list[Compared] = []
    for name, found in _compared(terminal, question.model, model_options):
        with opened(terminal, found, model_options) as llm:
            # All draw with the seed that the first one drew, so that only the buckets differ.
            compared, seed = _answer(terminal, llm, name, question)
        answers.append(compared)
        sampling = replace(question.generation.sampling, seed=seed)
        question = replace(question, generation=replace(question.generation, sampling=sampling))
    if as_json:
        terminal.write(json.dumps(_report(answers), ensure_ascii=False) + "\n")
        return
    width = None if terminal.output_is_terminal else _PLAIN_WIDTH
    unicode = (terminal.output.encoding or "").lower().startswith("utf")
    show_answers(Console(file=terminal.output, highlight=False, emoji=False, width=width), answers, unicode=unicode)


def _compared(terminal: Terminal, model: str | None, options: ModelOptions) -> list[tuple[str, Prepared]]:
    """One bucket, the default set, and the model's default profile if it has one."""
    config, context = options.model_config(model), options.context_config()

    def made(asked: BucketConfig | None, **settings: Any) -> Prepared:
        return prepare(config, context, asked, prefill_base=options.prefill_base, warn=terminal.warn, **settings)

    single, usual = made(BucketConfig(count=1)), made(None, profile=NO_PROFILE)
    found = [("one bucket", single), ("default", usual)]
    own = made(None)
    if own.profile is not None:
        found.append((f"profile {own.profile.name}", own))
    return found


def _answer(terminal: Terminal, llm: LLM, name: str, question: Question) -> tuple[Compared, int]:
    """What one set of buckets answers, and the seed that it drew with."""
    recorder = Recorder(
        nearest_base(llm.bases, llm.model.header.native_base),
        lambda token: llm.piece(token).decode("utf-8", "backslashreplace"),
    )
    asked = replace(question, generation=replace(question.generation, observer=recorder)).asked(llm)
    with terminal.working(f"{name} answers"):
        running = answered(terminal, llm, asked, shown=False).running
    if running is None:
        raise UsageError("there is no answer to compare", "ask for one token or more")
    told = texts(llm.piece(step.token) for step in recorder.steps)
    steps = tuple(replace(step, text=text) for step, text in zip(recorder.steps, told, strict=True))
    return Compared(name, len(llm.bases), steps), running.seed


def _report(answers: list[Compared]) -> dict[str, Any]:
    """The object that --json prints."""
    first = answers[0]
    found = []
    for answer in answers:
        place = parting(first.steps, answer.steps)
        found.append(
            {
                "name": answer.name,
                "buckets": answer.buckets,
                "text": "".join(step.text for step in answer.steps),
                "tokens": [step.token for step in answer.steps],
                "probabilities": [round(step.probability, 6) for step in answer.steps],
                "parts_at": None if place is None else place.place,
            }
        )
    return {"answers": found}
