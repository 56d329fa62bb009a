"""Chat templates: messages -> text -> tokens, in which only the template's own control tokens count as such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from abcli.chat.control_text import ControlText, Marks, unused_marks
from abcli.chat.files import read_text_file
from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.messages import Message
from abcli.chat.sandbox import OTHER_TEMPLATE, CompiledTemplate
from abcli.errors import PromptError, TemplateError
from abcli.native.model import Model

_MAX_SOURCE_BYTES = 1024 * 1024
# llama_token_attr bits; white space before or after a token that strips belongs to it.
_CONTROL = 1 << 3
_BYTE = 1 << 5
_STRIPS_LEFT = 1 << 7
_STRIPS_RIGHT = 1 << 8
_WHITE_SPACE = " \t\n\v\f\r"


class ChatTemplate:
    """A Jinja chat template, rendered and tokenized for one model."""

    def __init__(self, source: str, model: Model) -> None:
        """Raises TemplateError if `source` is not a template or is larger than 1 MB."""
        if len(source) > _MAX_SOURCE_BYTES:
            raise TemplateError(f"the chat template is too long: {len(source):,} characters", OTHER_TEMPLATE)
        self._model = model
        self._template = CompiledTemplate(source)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation; `add_generation_prompt` opens the assistant's answer.

        Raises TemplateError if the template fails or refuses the messages.
        """
        return self._render(messages, lambda content: content, add_generation_prompt)

    def tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The tokens of a conversation, beginning-of-sequence included where the model wants it.

        Control tokens that the template writes are control tokens; the same characters inside a message stay
        text. While the messages spell out none, the result is llama.cpp's for the rendered text.

        With a further turn the tokens are continued, not changed, if the template only appends to its text and
        the answer does not begin with white space (which could join the token before it).

        Raises TemplateError as `render` does, and PromptError for text that cannot be tokenized.
        """
        rendered = self.render(messages, add_generation_prompt=add_generation_prompt)
        parts = self._control.split(rendered)
        marks = unused_marks(rendered + "".join(message.content for message in messages))
        if marks is None:
            raise PromptError("the messages use every private-use character", "remove some of them")
        # No part of a message can be part of a control token here, so what is found is the template's own.
        guarded = self._render(
            messages, lambda content: self._control.break_everywhere(content, marks), add_generation_prompt
        )
        own_parts = self._control.split(guarded, marks)
        if parts == [part if isinstance(part, int) else marks.remove(part) for part in own_parts]:
            return self._plain_tokens(rendered)
        # The lighter change may keep a template happy that looks for something in the messages, e.g. "<think>".
        broken = self._render(
            messages, lambda content: self._control.break_tokens(content, marks), add_generation_prompt
        )
        broken_parts = self._control.split(broken, marks)
        chosen = broken_parts if _controls(broken_parts) == _controls(own_parts) else own_parts
        return self._tokens_of_parts(chosen, marks)

    @cached_property
    def _control(self) -> ControlText:
        return ControlText(self._model.control_tokens)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What the model's tokenizer adds before and after a text."""
        body = self._model.tokenize("a", add_special=False, parse_special=False)
        whole = self._model.tokenize("a", add_special=True, parse_special=False)
        start = next(at for at in range(len(whole)) if whole[at : at + len(body)] == body)
        return whole[:start], whole[start + len(body) :]

    def _render(self, messages: Sequence[Message], change: Callable[[str], str], add_generation_prompt: bool) -> str:
        """The text of the messages, the content of each having gone through `change`."""
        contents = [change(message.content) for message in messages]
        variables = {
            "messages": [
                {"role": message.role, "content": content} for message, content in zip(messages, contents, strict=True)
            ],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._model.bos_text,
            "eos_token": self._model.eos_text,
            "tools": None,
            "documents": None,
        }
        has_system = any(message.role == "system" for message in messages)
        return self._template.render(
            variables,
            content_size=sum(map(len, contents)),
            refusal_hint=f"drop `system` or {OTHER_TEMPLATE}" if has_system else OTHER_TEMPLATE,
        )

    def _plain_tokens(self, rendered: str) -> list[int]:
        return self._model.tokenize(rendered, add_special=self._lacks_start(rendered), parse_special=True)

    def _lacks_start(self, rendered: str) -> bool:
        """Whether the tokenizer still has to add what the model wants around a text."""
        bos = self._model.bos_text
        return not (bos and rendered.startswith(bos))

    def _tokens_of_parts(self, parts: Sequence[str | int], marks: Marks) -> list[int]:
        """Tokenize the texts between control tokens, as llama.cpp does after it has split a text at those."""
        model = self._model
        tokens: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                tokens.append(part)
                continue
            text = marks.remove(part)
            before, after = parts[index - 1 : index], parts[index + 1 : index + 2]
            if before and isinstance(before[0], int) and model.attributes(before[0]) & _STRIPS_RIGHT:
                text = text.lstrip(_WHITE_SPACE)
            if after and isinstance(after[0], int) and model.attributes(after[0]) & _STRIPS_LEFT:
                text = text.rstrip(_WHITE_SPACE)
            tokens += self._text_tokens(text)
        first = parts[0] if parts else None
        if isinstance(first, int) and first == model.control_tokens.get(model.bos_text):
            return tokens
        start, end = self._ends
        return [*start, *tokens, *end]

    def _text_tokens(self, text: str) -> list[int]:
        """The tokens of plain text. Raises PromptError if it cannot be written without a control token."""
        model = self._model
        tokens = []
        for token in model.tokenize(text, add_special=False, parse_special=False) if text else []:
            # SentencePiece may merge letters into a control token even so; single bytes say the same.
            spelled = model.piece(token, special=True) if model.attributes(token) & _CONTROL else b""
            if not all(byte in self._byte_tokens for byte in spelled):
                raise PromptError(
                    f"this tokenizer cannot write {spelled.decode('utf-8', 'replace')!r} as text", "leave it out"
                )
            tokens += [self._byte_tokens[byte] for byte in spelled] if spelled else [token]
        return tokens

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """Byte -> the token that stands for it alone, where the vocabulary has such tokens."""
        model = self._model
        found = (token for token in range(model.vocabulary_size) if model.attributes(token) & _BYTE)
        return {model.piece(token)[0]: token for token in found}


def load_template(model: Model, choice: str | None) -> ChatTemplate:
    """The chat template named `choice`, else the file `choice`; None means the model's own.

    Raises TemplateError if there is none (nothing is guessed), or if it cannot be read or compiled.
    """
    if choice is not None:
        return ChatTemplate(template_source(choice), model)
    source = model.chat_template
    if not source:
        raise TemplateError(
            f"{model.path.name} has no chat template",
            f"give `chat_template` with a file or one of: {', '.join(KNOWN_TEMPLATES)}",
        )
    return ChatTemplate(source, model)


def template_source(choice: str) -> str:
    """The chat template named `choice`, else that in the file `choice`. Raises TemplateError if it cannot be read."""
    if choice in KNOWN_TEMPLATES:
        return KNOWN_TEMPLATES[choice]
    try:
        return read_text_file(Path(choice), _MAX_SOURCE_BYTES)
    except PromptError as error:
        raise TemplateError(
            f"there is no chat template {choice!r}: {error.message}",
            f"give a file or one of: {', '.join(KNOWN_TEMPLATES)}",
        ) from error


def _controls(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]
