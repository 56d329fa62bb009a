"""Chat templates: messages -> text -> tokens, in which only the template's own control tokens count as such."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from abcli.chat.calls.find import find_format
from abcli.chat.calls.format import HERMES, CallFormat
from abcli.chat.completeness import missing_message
from abcli.chat.control_text import ControlText, Marks
from abcli.chat.files import read_text_file
from abcli.chat.guarding import Breaker, Guard, marks_for
from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.message_format import message_fields
from abcli.chat.messages import Message, Role, ToolCall
from abcli.chat.options import ChatOptions, tool_variables
from abcli.chat.part_tokens import PartTokenizer
from abcli.chat.sandbox import OTHER_TEMPLATE, CompiledTemplate, RefusalError
from abcli.chat.shapes import shapes, told_in_words
from abcli.chat.thoughts import CLOSE, split_thought
from abcli.chat.windows import WindowedRendering
from abcli.errors import PromptError, TemplateError
from abcli.native.model import Model

_MAX_SOURCE_BYTES = 1024 * 1024
_KEPT_ANSWERS = 64
# A text that no template has of itself.
_PROBE = "qzprobezq"

PLAIN = ChatOptions()

# Hears a remark for the person at the terminal.
Tell = Callable[[str], object]


def _silent(_remark: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class _Accepted:
    """A conversation as the template takes it: plain, and with marks that keep its text from being control tokens."""

    messages: tuple[Message, ...]
    options: ChatOptions
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
        self.source = source
        self._model = model
        self._template = CompiledTemplate(source)
        self._tokenizer = PartTokenizer(model)
        self._windows = WindowedRendering(self._whole)
        self._opens_thought = lru_cache(_KEPT_ANSWERS)(self._probe_opening)
        self._takes_tools = lru_cache(_KEPT_ANSWERS)(self._probe_tools)
        self._tell = tell
        self._told: set[str] = set()

    def render(
        self, messages: Sequence[Message], options: ChatOptions = PLAIN, *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; `add_generation_prompt` opens the assistant's answer.

        What the template refuses as it is (system messages, several of one role in a row) is handed over in another
        shape; a thought at the beginning of an old answer is handed over as a thought. Raises TemplateError if the
        template fails, refuses the messages in every shape, or leaves the text of one, or a tool, out.
        """
        return self._accepted(messages, options, add_generation_prompt).rendered

    def tokens(
        self, messages: Sequence[Message], options: ChatOptions = PLAIN, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The tokens of a conversation, beginning-of-sequence included where the model wants it.

        Control tokens that the template writes are control tokens; the same characters inside a message or an option
        stay text. While those spell out none, the result is llama.cpp's for the rendered text.

        With a further turn the tokens are continued, not changed, if the template only appends to its text and
        the answer does not begin with white space (which could join the token before it).

        Raises TemplateError as `render` does, and PromptError for text that cannot be tokenized.
        """
        accepted = self._accepted(messages, options, add_generation_prompt)
        marks = accepted.marks
        parts = self._control.split(accepted.rendered)
        # No part of a message can be part of a control token here, so what is found is the template's own.
        own_parts = self._control.split(accepted.guarded, marks)
        if parts == [part if isinstance(part, int) else marks.remove(part) for part in own_parts]:
            return self._tokenizer.plain(accepted.rendered)
        # The lighter change may keep a template happy that looks for something in the messages, e.g. "<think>".
        breaker = Breaker(self._control, marks)
        broken = tuple(map(breaker.message, accepted.messages))
        text = self._text(broken, breaker.options(accepted.options), add_generation_prompt, marks)
        broken_parts = self._control.split(text, marks)
        chosen = broken_parts if _controls(broken_parts) == _controls(own_parts) else own_parts
        return self._tokenizer.of_parts(chosen, marks)

    def continued_tokens(self, messages: Sequence[Message], options: ChatOptions = PLAIN) -> list[int]:
        """The tokens of a conversation whose last message is the beginning of an answer, which goes on from there.

        Raises as `tokens`, and TemplateError where answers begin inside a thought.
        """
        if self.opens_thought(options):
            raise TemplateError(
                "the chat template begins answers with a thought, so none can be continued", "switch `thinking` off"
            )
        return [*self.tokens(messages[:-1], options), *self._tokenizer.text(messages[-1].content)]

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Text -> token of what grammars have to name by its number."""
        return self._model.read_vocabulary().special_tokens

    def tokens_in(self, text: str) -> frozenset[int]:
        """The control tokens that `text` spells out."""
        return frozenset(_controls(self._control.split(text)))

    def written_tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that the template or the model writes itself, control tokens as such."""
        return tuple(self._model.tokenize(text, add_special=False, parse_special=True))

    def opens_thought(self, options: ChatOptions = PLAIN) -> bool:
        """Whether an answer begins inside a thought, because the template opens it."""
        return self._opens_thought(options)

    def call_format(self, options: ChatOptions = PLAIN) -> CallFormat:
        """How the model writes thoughts and calls of the tools in `options`."""
        found = self._written_format
        if options.usable_tools and not self._takes_tools(options):
            return replace(HERMES, thoughts=found.thoughts, fallback=True)
        return found

    @cached_property
    def _written_format(self) -> CallFormat:
        return find_format(self._render_values)

    def _render_values(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """See `abcli.chat.calls.find.Render`."""
        further = {**tool_variables(tools), **variables} if tools else variables
        return self._rendered([dict(message) for message in messages], add_generation_prompt, further)

    def _probe_tools(self, options: ChatOptions) -> bool:
        """Whether the template lists the tools: some know none, some fail on what tools may say."""
        if self._written_format.fallback:
            return False
        written = self._probe([self._fields(Message("user", "a"))], options)
        return all(tool.name in written for tool in options.usable_tools)

    def _probe_opening(self, options: ChatOptions) -> bool:
        thoughts = self._written_format.thoughts
        return thoughts is not None and thoughts.opened_by(self._probe([self._fields(Message("user", "a"))], options))

    def _accepted(self, messages: Sequence[Message], options: ChatOptions, add_generation_prompt: bool) -> _Accepted:
        """The conversation in the first shape that the template takes with the text of every message."""
        given = tuple(self._with_thought_apart(message) for message in messages)
        if options.usable_tools and not self._takes_tools(options):
            self._say("the chat template knows no tools, so the system message lists them")
            given = told_in_words(given, options.usable_tools)
            options = replace(options, tools=(), tool_choice="auto")
        marks = marks_for(given, options)
        guard = Guard(self._control, marks)
        guarded_options = guard.options(options)
        first_error: TemplateError | None = None
        for shape, change in shapes(given):
            try:
                rendered = self._text(shape, options, add_generation_prompt, marks)
                guarded_shape = tuple(map(guard.message, shape))
                guarded = self._text(guarded_shape, guarded_options, add_generation_prompt, marks)
            except TemplateError as error:
                first_error = first_error or error
                continue
            _check_tools(guarded_options, guarded, marks)
            lost = missing_message(guarded_shape, guarded, marks)
            if lost is None:
                if change:
                    self._say(f"the chat template does not take this conversation as it is: {change}")
                return _Accepted(shape, options, marks, rendered, guarded)
            first_error = first_error or TemplateError(
                f"the chat template leaves out message {lost + 1}, of the role {shape[lost].role}", OTHER_TEMPLATE
            )
        if isinstance(first_error, RefusalError):
            number = self._first_refused(given, options)
            raise RefusalError(
                f"the chat template refuses message {number}, of the role {given[number - 1].role}: "
                f"{first_error.message}",
                first_error.hint,
            ) from first_error
        raise first_error or TemplateError("there is no message", "type one")

    def _say(self, remark: str) -> None:
        """Tell it once."""
        if remark not in self._told:
            self._told.add(remark)
            self._tell(remark)

    def _with_thought_apart(self, message: Message) -> Message:
        """An answer that was stored as the model wrote it, as templates expect it."""
        if message.role != "assistant" or message.reasoning_content or CLOSE not in message.content:
            return message
        thought, answer = split_thought(message.content, opened=self.opens_thought())
        return replace(message, content=answer, reasoning_content=thought)

    def _first_refused(self, messages: tuple[Message, ...], options: ChatOptions) -> int:
        """The number of the message with which a refused conversation begins to be refused."""
        accepted, refused = 0, len(messages)
        while refused - accepted > 1:
            middle = (accepted + refused) // 2
            try:
                self._whole(messages[:middle], options, False)
                accepted = middle
            except TemplateError:
                refused = middle
        return refused

    @cached_property
    def _control(self) -> ControlText:
        return ControlText(self._model.control_tokens)

    def _text(
        self, messages: tuple[Message, ...], options: ChatOptions, add_generation_prompt: bool, marks: Marks
    ) -> str:
        """The text of messages that are as the template wants them."""
        text = self._windows.text(messages, options, add_generation_prompt, marks.anchor)
        return self._whole(messages, options, add_generation_prompt) if text is None else text

    def _whole(self, messages: tuple[Message, ...], options: ChatOptions, add_generation_prompt: bool) -> str:
        return self._rendered(
            [self._fields(message) for message in messages], add_generation_prompt, options.variables()
        )

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool, further: Mapping[str, Any]) -> str:
        """What the template makes of messages as JSON values and of `further` variables. Raises TemplateError."""
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
            **further,
        }
        size = sum(len(str(text)) for message in messages for text in message.values()) + len(str(further))
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

    def _probe(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN) -> str:
        """What the template writes for `messages` up to the answer; empty if it fails."""
        try:
            return self._rendered(messages, True, options.variables())
        except TemplateError:
            return ""


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


def _in_parts(fields: dict[str, Any], roles: frozenset[Role]) -> dict[str, Any]:
    """A message's fields, its content as a list of parts if its role is one of `roles`."""
    if fields["role"] not in roles:
        return fields
    return {**fields, "content": [{"type": "text", "text": fields["content"]}]}


def _controls(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _check_tools(options: ChatOptions, written: str, marks: Marks) -> None:
    """Raise TemplateError for a tool, broken up by `marks`, whose name is not in `written`."""
    for tool in options.usable_tools:
        if tool.name not in written and marks.spelled(tool.name) not in written:
            name = marks.remove(tool.name)
            raise TemplateError(f"the chat template leaves out the tool {name}", OTHER_TEMPLATE)
