"""Chat templates: messages -> text -> tokens, in which only the template's own control tokens count as such."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from abcli.chat.completeness import missing_message
from abcli.chat.control_text import ControlText, Marks, unused_marks
from abcli.chat.files import read_text_file
from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.message_format import message_fields
from abcli.chat.messages import Message, Role, ToolCall
from abcli.chat.sandbox import OTHER_TEMPLATE, CompiledTemplate, RefusalError
from abcli.chat.shapes import shapes
from abcli.chat.thoughts import CLOSE, OPEN, split_thought
from abcli.chat.windows import WindowedRendering
from abcli.errors import PromptError, TemplateError
from abcli.native.model import Model

_MAX_SOURCE_BYTES = 1024 * 1024
# llama_token_attr bits; white space before or after a token that strips belongs to it.
_CONTROL = 1 << 3
_BYTE = 1 << 5
_STRIPS_LEFT = 1 << 7
_STRIPS_RIGHT = 1 << 8
_WHITE_SPACE = " \t\n\v\f\r"
# A text that no template has of itself.
_PROBE = "qzprobezq"

# Hears a remark for the person at the terminal.
Tell = Callable[[str], object]


def _silent(_remark: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class _Accepted:
    """A conversation as the template takes it: plain, and with marks that keep its text from being control tokens."""

    messages: tuple[Message, ...]
    marks: Marks
    rendered: str
    guarded: str


@dataclass(frozen=True)
class _CallForm:
    """How a template wants an assistant's message with calls: most want arguments as objects and an empty text."""

    arguments_as_text: bool
    empty_as_none: bool

    def of(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A message's fields in this form."""
        calls = fields["tool_calls"]
        if not self.arguments_as_text:
            functions = [call["function"] for call in calls]
            objects = [{**function, "arguments": json.loads(function["arguments"])} for function in functions]
            calls = [{**call, "function": function} for call, function in zip(calls, objects, strict=True)]
        content = None if self.empty_as_none and not fields["content"] else fields["content"]
        return {**fields, "content": content, "tool_calls": calls}


class ChatTemplate:
    """A Jinja chat template, rendered and tokenized for one model."""

    def __init__(self, source: str, model: Model, tell: Tell = _silent) -> None:
        """`tell` hears, once each, how conversations are changed for the template's sake.

        Raises TemplateError if `source` is not a template or is larger than 1 MB.
        """
        if len(source) > _MAX_SOURCE_BYTES:
            raise TemplateError(f"the chat template is too long: {len(source):,} characters", OTHER_TEMPLATE)
        self._model = model
        self._template = CompiledTemplate(source)
        self._windows = WindowedRendering(self._whole)
        self._tell = tell
        self._told: set[str] = set()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation; `add_generation_prompt` opens the assistant's answer.

        What the template refuses as it is (system messages, several of one role in a row) is handed over in another
        shape; a thought at the beginning of an old answer is handed over as a thought. Raises TemplateError if the
        template fails, refuses the messages in every shape, or leaves the text of one out.
        """
        return self._accepted(messages, add_generation_prompt).rendered

    def tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The tokens of a conversation, beginning-of-sequence included where the model wants it.

        Control tokens that the template writes are control tokens; the same characters inside a message stay
        text. While the messages spell out none, the result is llama.cpp's for the rendered text.

        With a further turn the tokens are continued, not changed, if the template only appends to its text and
        the answer does not begin with white space (which could join the token before it).

        Raises TemplateError as `render` does, and PromptError for text that cannot be tokenized.
        """
        accepted = self._accepted(messages, add_generation_prompt)
        marks = accepted.marks
        parts = self._control.split(accepted.rendered)
        # No part of a message can be part of a control token here, so what is found is the template's own.
        own_parts = self._control.split(accepted.guarded, marks)
        if parts == [part if isinstance(part, int) else marks.remove(part) for part in own_parts]:
            return self._plain_tokens(accepted.rendered)
        # The lighter change may keep a template happy that looks for something in the messages, e.g. "<think>".
        broken = tuple(self._broken(message, marks) for message in accepted.messages)
        broken_parts = self._control.split(self._text(broken, add_generation_prompt, marks), marks)
        chosen = broken_parts if _controls(broken_parts) == _controls(own_parts) else own_parts
        return self._tokens_of_parts(chosen, marks)

    @cached_property
    def opens_thought(self) -> bool:
        """Whether an answer begins inside a thought, because the template opens it."""
        return self._probe([self._fields(Message("user", "a"))]).rstrip().endswith(OPEN)

    def _accepted(self, messages: Sequence[Message], add_generation_prompt: bool) -> _Accepted:
        """The conversation in the first shape that the template takes with the text of every message."""
        given = tuple(self._with_thought_apart(message) for message in messages)
        marks = unused_marks("".join(message.content + message.reasoning_content for message in given))
        if marks is None:
            raise PromptError("the messages use every private-use character", "remove some of them")
        first_error: TemplateError | None = None
        for shape, change in shapes(given):
            try:
                rendered = self._text(shape, add_generation_prompt, marks)
                guard = tuple(self._guarded(message, marks) for message in shape)
                guarded = self._text(guard, add_generation_prompt, marks)
            except TemplateError as error:
                first_error = first_error or error
                continue
            lost = missing_message(guard, guarded, marks)
            if lost is None:
                if change and change not in self._told:
                    self._told.add(change)
                    self._tell(f"the chat template does not take this conversation as it is: {change}")
                return _Accepted(shape, marks, rendered, guarded)
            first_error = first_error or TemplateError(
                f"the chat template leaves out message {lost + 1}, of the role {shape[lost].role}", OTHER_TEMPLATE
            )
        if isinstance(first_error, RefusalError):
            number = self._first_refused(given)
            raise RefusalError(
                f"the chat template refuses message {number}, of the role {given[number - 1].role}: "
                f"{first_error.message}",
                first_error.hint,
            ) from first_error
        raise first_error or TemplateError("there is no message", "type one")

    def _guarded(self, message: Message, marks: Marks) -> Message:
        """`message` in such a form that no part of it can be part of a control token."""
        content = self._control.break_everywhere(message.content, marks, marks.edge)
        thought = self._control.break_everywhere(message.reasoning_content, marks, marks.inner_edge)
        calls = _changed_calls(
            message,
            lambda name: self._control.break_everywhere(name, marks, marks.inner_edge),
            lambda text: self._control.break_everywhere(text, marks, ""),
        )
        return replace(message, content=content, reasoning_content=thought, tool_calls=calls)

    def _broken(self, message: Message, marks: Marks) -> Message:
        """`message` with the control tokens in it broken up."""
        content = self._control.break_tokens(message.content, marks)
        thought = self._control.break_tokens(message.reasoning_content, marks)
        broken = partial(self._control.break_tokens, marks=marks)
        calls = _changed_calls(message, broken, broken)
        return replace(message, content=content, reasoning_content=thought, tool_calls=calls)

    def _with_thought_apart(self, message: Message) -> Message:
        """An answer that was stored as the model wrote it, as templates expect it."""
        if message.role != "assistant" or message.reasoning_content or CLOSE not in message.content:
            return message
        thought, answer = split_thought(message.content, opened=self.opens_thought)
        return replace(message, content=answer, reasoning_content=thought)

    def _first_refused(self, messages: tuple[Message, ...]) -> int:
        """The number of the message with which a refused conversation begins to be refused."""
        accepted, refused = 0, len(messages)
        while refused - accepted > 1:
            middle = (accepted + refused) // 2
            try:
                self._whole(messages[:middle], False)
                accepted = middle
            except TemplateError:
                refused = middle
        return refused

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

    def _text(self, messages: tuple[Message, ...], add_generation_prompt: bool, marks: Marks) -> str:
        """The text of messages that are as the template wants them."""
        text = self._windows.text(messages, add_generation_prompt, marks.anchor)
        return self._whole(messages, add_generation_prompt) if text is None else text

    def _whole(self, messages: tuple[Message, ...], add_generation_prompt: bool) -> str:
        return self._rendered([self._fields(message) for message in messages], add_generation_prompt)

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        now = datetime.now().astimezone()
        # Variables without a value are left undefined, as in llama.cpp: some templates fail on None. The last three are
        # what others set for single families.
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._model.bos_text,
            "eos_token": self._model.eos_text,
            "functions": "",
            "datetime": now.strftime("%b %d %Y"),
            "date_string": now.strftime("%d %b %Y"),
        }
        size = sum(len(str(text)) for message in messages for text in message.values())
        return self._template.render(variables, content_size=size, message_count=len(messages))

    def _fields(self, message: Message) -> dict[str, Any]:
        """`message` as the template wants it."""
        fields = message_fields(message)
        if message.content or not message.tool_calls:
            fields = _in_parts(fields, self._roles_with_parts)
        return self._call_form.of(fields) if message.tool_calls else fields

    @cached_property
    def _roles_with_parts(self) -> frozenset[Role]:
        """The roles whose content must be a list of parts: given as text it is not in what the template writes."""
        found: frozenset[Role] = frozenset()
        question = {"role": "user", "content": "a"}
        roles: tuple[Role, ...] = ("user", "assistant", "system")
        for role in roles:
            asked = {"role": role, "content": _PROBE}
            conversation = [asked] if role == "user" else [asked, question]
            if role == "assistant":
                conversation.insert(0, question)
            for wanted in (found, found | {role}):
                if _PROBE in self._probe([_in_parts(fields, wanted) for fields in conversation]):
                    found = wanted
                    break
        return found

    @cached_property
    def _call_form(self) -> _CallForm:
        """How an answer that only calls tools must be written for the call to be in what the template writes."""
        question = {"role": "user", "content": [{"type": "text", "text": "a"}] if self._roles_with_parts else "a"}
        call = ToolCall("f", json.dumps({"a": _PROBE}), "123456789")
        answer = message_fields(Message("assistant", "", tool_calls=(call,)))
        result = {"role": "tool", "content": "b", "tool_call_id": call.id, "name": call.name}
        forms = [_CallForm(text, none) for none in (False, True) for text in (False, True)]
        return next((form for form in forms if _PROBE in self._probe([question, form.of(answer), result])), forms[0])

    def _probe(self, messages: list[dict[str, Any]]) -> str:
        """What the template writes for `messages` up to the answer; empty if it fails."""
        try:
            return self._rendered(messages, True)
        except TemplateError:
            return ""

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


def load_template(model: Model, choice: str | None, tell: Tell = _silent) -> ChatTemplate:
    """The chat template named `choice`, else the file `choice`; None means the model's own.

    `tell` hears how conversations are changed for its sake.

    Raises TemplateError if there is none (nothing is guessed), or if it cannot be read or compiled.
    """
    if choice is not None:
        return ChatTemplate(template_source(choice), model, tell)
    source = model.chat_template
    if not source:
        raise TemplateError(
            f"{model.path.name} has no chat template",
            f"give `chat_template` with a file or one of: {', '.join(KNOWN_TEMPLATES)}",
        )
    return ChatTemplate(source, model, tell)


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


def _changed_calls(
    message: Message, change_name: Callable[[str], str], change: Callable[[str], str]
) -> tuple[ToolCall, ...]:
    """The calls of a message, their names and the texts in their arguments having gone through a change."""

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(key): changed(item) for key, item in value.items()}
        return [changed(item) for item in value] if isinstance(value, list) else value

    return tuple(
        replace(
            call,
            name=change_name(call.name),
            arguments=json.dumps(changed(json.loads(call.arguments)), ensure_ascii=False),
        )
        for call in message.tool_calls
    )


def _in_parts(fields: dict[str, Any], roles: frozenset[Role]) -> dict[str, Any]:
    """A message's fields, its content as a list of parts if its role is one of `roles`."""
    if fields["role"] not in roles:
        return fields
    return {**fields, "content": [{"type": "text", "text": fields["content"]}]}


def _controls(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]
