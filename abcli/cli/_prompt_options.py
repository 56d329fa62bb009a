"""The ways to give a prompt, and its answer as it comes, which commands share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from abcli.chat.answer import Piece
from abcli.chat.asking import Asked, check_together
from abcli.chat.files import decode_prompt, read_text_file
from abcli.chat.message_format import Prompt
from abcli.chat.messages import Message
from abcli.chat.options import ChatOptions
from abcli.cli._chat_options import ChatFlags
from abcli.cli._flags import flag
from abcli.cli._options import AnswerOptions, check_argument
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.grammar.check import check
from abcli.hub.locate import looks_like_model
from abcli.llm import LLM
from abcli.sampling import GenerationConfig
from abcli.ui.terminal import Terminal, on_interrupt

PromptWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL] [PROMPT]", help="Model file or name (default: the default model) and prompt."),
]


@dataclass(frozen=True)
class Question:
    """A prompt, how to decode its answer, and how the model is to be told; `model` is the one named without a flag."""

    model: str | None
    messages: Prompt
    options: ChatOptions
    generation: GenerationConfig
    raw: bool
    parse_special: bool

    def asked(self, llm: LLM) -> Asked:
        """What `llm` answers. Raises as `LLM.ask`."""
        return llm.ask(self.messages, self.options, self.generation, raw=self.raw, parse_special=self.parse_special)


@dataclass(frozen=True)
class PromptOptions:
    """Where a prompt comes from, and how it is read."""

    panel: ClassVar[str] = "Prompt"

    prompt: Annotated[str | None, flag("The prompt, instead of PROMPT.", "--prompt", "-p")] = None
    file: Annotated[
        str | None, flag("Read the prompt from a file, - for standard input; PROMPT follows it.", "--file", "-f")
    ] = None
    system: Annotated[str | None, flag("The system prompt.", "--system", "-sys")] = None
    raw: Annotated[bool, flag("Continue the text as it is, without a chat template.", "--raw")] = False
    parse_special: Annotated[
        bool, flag("With --raw: read control tokens in the prompt as such.", "--parse-special")
    ] = False

    def question(
        self,
        words: list[str],
        model: str | None,
        answer_options: AnswerOptions,
        chat_flags: ChatFlags,
        generation: GenerationConfig,
    ) -> Question:
        """What is asked, from the positional `words` and the flags; `model` is the one given by a flag.

        Raises UsageError, PromptError and GrammarError.
        """
        named, text = split_words(words, has_model=model is not None, has_prompt=self.prompt is not None)
        if self.prompt is not None and text is not None:
            raise UsageError("the prompt is given twice", "give --prompt or PROMPT")
        text = self.prompt if self.prompt is not None else text
        text = gather_prompt(answer_options.text(text, "the prompt") if text is not None else None, self.file)
        options = chat_flags.options()
        self._check_raw(options)
        check(generation.sampling)
        check_together(options, generation.sampling)
        system = [] if self.system is None else [Message("system", answer_options.text(self.system, "--system"))]
        messages: Prompt = text if self.raw else [*system, Message("user", text)]
        return Question(named, messages, options, generation, self.raw, self.parse_special)

    def _check_raw(self, options: ChatOptions) -> None:
        if self.raw and options != ChatOptions():
            raise UsageError("--raw has no place for tools and thoughts", "drop their flags, or --raw")
        if self.raw and self.system is not None:
            raise UsageError("--raw has no place for --system", "write it into the prompt")
        if self.parse_special and not self.raw:
            raise UsageError("--parse-special only works with --raw", "a chat template brings its own control tokens")


def answered(terminal: Terminal, llm: LLM, asked: Asked, *, shown: bool, trace: bool = False) -> Piece:
    """The last piece of an answer, which is written as it comes if it is to be `shown`. Raises as `LLM.answer`."""
    with on_interrupt(llm.cancel), terminal.prefill_progress() as progress, terminal.tracing() as tracing:
        try:
            for piece in llm.answer(asked, progress, trace=trace, on_trace=tracing):
                if shown:
                    terminal.write_answer(piece.text)
        except AbcliError:
            terminal.end_line()
            raise
    return piece


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
