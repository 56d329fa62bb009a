"""`abcli run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from abcli.chat.answer import Answer
from abcli.chat.asking import check_together
from abcli.chat.files import decode_prompt, read_text_file
from abcli.chat.message_format import Prompt, call_fields
from abcli.chat.messages import Message, ToolCall
from abcli.chat.options import ChatOptions
from abcli.cli._chat_options import ChatFlags
from abcli.cli._flags import flag
from abcli.cli._options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions, check_argument
from abcli.cli._setup import opened, prepared
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.grammar.check import check
from abcli.hub.locate import looks_like_model
from abcli.llm import LLM
from abcli.ui.terminal import Terminal, on_interrupt


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [PROMPT]", help="Model file or name (default: the default model) and prompt."),
    ] = None,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt, instead of PROMPT.")] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="Read the prompt from a file, - for standard input; PROMPT follows it."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-sys", help="The system prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="With --raw: read control tokens in the prompt as such.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    stats: Annotated[
        bool | None,
        flag("Speeds on standard error.", "--stats/--no-stats", show_default="on a terminal"),
    ] = None,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
    chat_flags: ChatFlags,
) -> None:
    """Answer one prompt: parse, load, generate, print."""
    model, text = split_words(words or [], has_model=model_options.model is not None, has_prompt=prompt is not None)
    if prompt is not None and text is not None:
        raise UsageError("the prompt is given twice", "give --prompt or PROMPT")
    text = prompt if prompt is not None else text
    text = gather_prompt(answer_options.text(text, "the prompt") if text is not None else None, file)
    options = chat_flags.options()
    _check_raw(raw=raw, parse_special=parse_special, system=system, options=options)
    generation = answer_options.config(sampling_options.config(), bucket_options.threshold())
    check(generation.sampling)
    check_together(options, generation.sampling)
    terminal = Terminal()
    found = prepared(terminal, model, model_options, bucket_options)
    with opened(terminal, found, model_options) as llm:
        messages = [Message("system", answer_options.text(system, "--system"))] if system is not None else []
        prompt_given: Prompt = text if raw else [*messages, Message("user", text)]
        asked = llm.ask(prompt_given, options, generation, raw=raw, parse_special=parse_special)
        with on_interrupt(llm.cancel), terminal.prefill_progress() as progress:
            try:
                for piece in llm.answer(asked, progress):
                    if not as_json:
                        terminal.write_answer(piece.text)
            except AbcliError:
                terminal.end_line()
                raise
        answer, running = piece.answer, piece.running
        if answer is None or running is None:
            return
        if as_json:
            terminal.write(json.dumps(_report(llm, answer), ensure_ascii=False) + "\n")
        terminal.end_line()
        if not as_json:
            terminal.write("".join(_call_line(call) for call in answer.tool_calls))
        if stats if stats is not None else terminal.interactive and not as_json:
            terminal.statistics(running.statistics, len(llm.held(running.slot)), llm.context_size, len(llm.bases))


def split_words(words: list[str], *, has_model: bool, has_prompt: bool) -> tuple[str | None, str | None]:
    """The model and the prompt among the positional words; None where a word is not given.

    A single word is the model if there is a --prompt or if it looks like a model, else the prompt (which may
    follow a --file). Raises UsageError for too many words.
    """
    if len(words) > 2:
        raise UsageError(f"{len(words)} words are given, but MODEL and PROMPT are two", "put the prompt in quotes")
    if len(words) == 2:
        return words[0], words[1]
    if not words:
        return None, None
    (word,) = words
    if not has_model and (has_prompt or looks_like_model(word)):
        return word, None
    return None, word


def gather_prompt(text: str | None, file: str | None) -> str:
    """The prompt from its sources: a file comes first, then PROMPT; with neither, standard input.

    Raises PromptError for an unreadable, undecodable or empty prompt.
    """
    parts = []
    if file is not None:
        parts.append(_standard_input() if file == "-" else read_text_file(Path(file)))
    elif text is None:
        if sys.stdin.isatty():
            raise PromptError("there is no prompt", "give PROMPT, -f FILE, or pipe text into standard input")
        parts.append(_standard_input())
    if text is not None:
        parts.append(check_argument(text, "the prompt"))
    whole = "\n\n".join(part.rstrip("\n") for part in parts[:-1]) + ("\n\n" if len(parts) > 1 else "") + parts[-1]
    if not whole.strip():
        raise PromptError("the prompt is empty", "give it some text")
    return whole


def _standard_input() -> str:
    return decode_prompt(sys.stdin.buffer.read(), "standard input")


def _check_raw(*, raw: bool, parse_special: bool, system: str | None, options: ChatOptions) -> None:
    if raw and options != ChatOptions():
        raise UsageError("--raw has no place for tools and thoughts", "drop their flags, or --raw")
    if raw and system is not None:
        raise UsageError("--raw has no place for --system", "write it into the prompt")
    if parse_special and not raw:
        raise UsageError("--parse-special only works with --raw", "a chat template brings its own control tokens")


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
