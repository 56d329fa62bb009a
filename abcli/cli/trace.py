"""`abcli trace`: one prompt, one answer, and what every bucket saw of it as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from abcli.cli._chat_options import ChatFlags
from abcli.cli._figures import check_trace_file
from abcli.cli._options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions
from abcli.cli._prompt_options import PromptOptions, PromptWords, answered
from abcli.cli._setup import opened, prepared
from abcli.trace.page import save_trace
from abcli.ui.terminal import Terminal

_DEFAULT_FILE = Path("trace.html")


def trace(
    words: PromptWords = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the trace: a page (.html) or data (.json); without --json to trace.html.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trace as JSON instead of the answer.")] = False,
    prompt_options: PromptOptions,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
    chat_flags: ChatFlags,
) -> None:
    """Answer one prompt, and show what the buckets saw: parse, load, generate, write."""
    if output is None and not as_json:
        output = _DEFAULT_FILE
    if output is not None:
        check_trace_file("--output", output)
    generation = answer_options.config(sampling_options.config(), bucket_options.threshold())
    question = prompt_options.question(words or [], model_options.model, answer_options, chat_flags, generation)
    terminal = Terminal()
    found = prepared(terminal, question.model, model_options, bucket_options)
    with opened(terminal, found, model_options) as llm:
        answer = answered(terminal, llm, question.asked(llm), shown=not as_json, trace=True).answer
    if answer is None or answer.trace is None:
        return
    terminal.end_line()
    if as_json:
        terminal.write(json.dumps(answer.trace.fields(), ensure_ascii=False) + "\n")
    if output is not None:
        save_trace(answer.trace, output)
        terminal.note(f"written to {output}")
