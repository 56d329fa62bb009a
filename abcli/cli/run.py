"""`abcli run`: one prompt, one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from abcli.chat.answer import Answer
from abcli.chat.message_format import call_fields
from abcli.chat.messages import ToolCall
from abcli.cli._chat_options import ChatFlags
from abcli.cli._figures import check_trace_file
from abcli.cli._flags import flag
from abcli.cli._options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions
from abcli.cli._prompt_options import PromptOptions, PromptWords, answered
from abcli.cli._setup import opened, prepared
from abcli.llm import LLM
from abcli.trace.page import save_trace
from abcli.ui.terminal import Terminal


def run(
    words: PromptWords = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    stats: Annotated[
        bool | None,
        flag("Speeds on standard error.", "--stats/--no-stats", show_default="on a terminal"),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write what the buckets saw to FILE: .html or .json.", metavar="FILE")
    ] = None,
    prompt_options: PromptOptions,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
    chat_flags: ChatFlags,
) -> None:
    """Answer one prompt: parse, load, generate, print."""
    if trace is not None:
        check_trace_file("--trace", trace)
    generation = answer_options.config(sampling_options.config(), bucket_options.threshold())
    question = prompt_options.question(words or [], model_options.model, answer_options, chat_flags, generation)
    terminal = Terminal()
    found = prepared(terminal, question.model, model_options, bucket_options)
    with opened(terminal, found, model_options) as llm:
        piece = answered(terminal, llm, question.asked(llm), shown=not as_json, trace=trace is not None)
        answer, running = piece.answer, piece.running
        if answer is None or running is None:
            return
        if as_json:
            terminal.write(json.dumps(_report(llm, answer), ensure_ascii=False) + "\n")
        terminal.end_line()
        if not as_json:
            terminal.write("".join(_call_line(call) for call in answer.tool_calls))
        if trace is not None and answer.trace is not None:
            save_trace(answer.trace, trace)
        if stats if stats is not None else terminal.interactive and not as_json:
            terminal.statistics(running.statistics, len(llm.held(running.slot)), llm.context_size, len(llm.bases))


def _call_line(call: ToolCall) -> str:
    """A call as a line of JSON."""
    value = {"name": call.name, "arguments": json.loads(call.arguments)}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _report(llm: LLM, answer: Answer) -> dict[str, Any]:
    """The object that --json prints."""
    usage = answer.usage
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": [call_fields(call) for call in answer.tool_calls],
        "finish_reason": answer.finish_reason,
        "model": str(llm.model.path),
        "lora": [{"path": str(adapter.path), "scale": adapter.scale} for adapter in llm.model.adapters],
        "bases": list(llm.bases),
        "merge": llm.buckets.merge,
        "seed": answer.seed,
        "agreement": round(answer.agreement, 6),
        "asked": round(answer.asked, 6),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
        "timings": {
            "load_s": round(llm.load_seconds, 6),
            "prefill_s": round(answer.timings.prefill, 6),
            "decode_s": round(answer.timings.decode, 6),
        },
    }
