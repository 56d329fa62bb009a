"""`abcli run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from abcli.chat.files import decode_prompt, read_text_file
from abcli.chat.messages import Message
from abcli.chat.template import load_template
from abcli.cli.options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions, check_argument
from abcli.cli.setup import Ready, ready, resolve_profile
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.generate import Answer
from abcli.hub.locate import looks_like_model
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
        typer.Option("--stats/--no-stats", help="Speeds on standard error.", show_default="on a terminal"),
    ] = None,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
) -> None:
    """Answer one prompt: parse, load, generate, print."""
    model, text = split_words(words or [], has_model=model_options.model is not None, has_prompt=prompt is not None)
    if prompt is not None and text is not None:
        raise UsageError("the prompt is given twice", "give --prompt or PROMPT")
    text = gather_prompt(prompt if prompt is not None else text, file)
    _check_raw(raw=raw, parse_special=parse_special, system=system)
    generation = answer_options.config(sampling_options.config())
    terminal = Terminal()
    engine_config, buckets = resolve_profile(terminal, model, model_options, bucket_options)
    with ready(terminal, engine_config, buckets, verbose=model_options.verbose) as loaded:
        opened = loaded.opened
        if raw:
            tokens = opened.model.tokenize(text, add_special=True, parse_special=parse_special)
        else:
            template = load_template(opened.model, model_options.chat_template, terminal.warn)
            messages = [Message("system", check_argument(system, "--system"))] if system is not None else []
            tokens = template.tokens([*messages, Message("user", text)])
        with on_interrupt(loaded.generator.cancel), terminal.prefill_progress() as progress:
            answer = None
            try:
                for piece in loaded.generator.stream(0, tokens, generation, progress):
                    answer = piece.answer
                    if not as_json:
                        terminal.write(piece.text)
            except AbcliError:
                terminal.end_line()
                raise
        if answer is None:
            return
        if as_json:
            terminal.write(json.dumps(_report(loaded, answer), ensure_ascii=False) + "\n")
        terminal.end_line()
        if stats if stats is not None else terminal.interactive and not as_json:
            engine = opened.engine
            used = len(engine.tokens(0))
            terminal.statistics(answer.statistics, used, engine.context_size, len(engine.bases))


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


def _check_raw(*, raw: bool, parse_special: bool, system: str | None) -> None:
    if raw and system is not None:
        raise UsageError("--raw has no place for --system", "write it into the prompt")
    if parse_special and not raw:
        raise UsageError("--parse-special only works with --raw", "a chat template brings its own control tokens")


def _report(loaded: Ready, answer: Answer) -> dict[str, Any]:
    """The object that --json prints."""
    statistics = answer.statistics
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "model": str(loaded.opened.model.path),
        "lora": [{"path": str(adapter.path), "scale": adapter.scale} for adapter in loaded.opened.header.adapters],
        "bases": list(loaded.opened.engine.bases),
        "merge": loaded.buckets.merge,
        "seed": answer.seed,
        "agreement": round(statistics.agreement, 6),
        "usage": {
            "prompt_tokens": statistics.prompt_tokens,
            "completion_tokens": statistics.completion_tokens,
            "total_tokens": statistics.prompt_tokens + statistics.completion_tokens,
        },
        "timings": {
            "load_s": round(loaded.opened.load_seconds, 6),
            "prefill_s": round(statistics.prefill_seconds, 6),
            "decode_s": round(statistics.decode_seconds, 6),
        },
    }
