"""What a record of the input asks for: our own JSON lines, and OpenAI's batch lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from abcli.chat.message_format import given, read_messages, read_text, shown
from abcli.chat.messages import Message
from abcli.chat.options import OPTIONS, ChatOptions, chat_options
from abcli.chat.response_format import response_schema
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.grammar.constraint import KINDS
from abcli.sampling import (
    NATIVE_RANDOM_SEED,
    GenerationConfig,
    SamplingConfig,
    check_gate,
    check_lookup,
    check_sampling,
)

OPENAI_URL = "/v1/chat/completions"

# OpenAI's fields that change nothing in an answer of a local model.
_IGNORED = (
    *("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "stream_options", "user"),
)
# The one value with which each of these says that it is not used.
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "stream": False,
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
}
_NO_REQUEST = f'write {{"custom_id", "method": "POST", "url": "{OPENAI_URL}", "body": {{"messages": [...]}}}}'
_NO_PROMPT = 'give it "prompt": "..." or "messages": [{"role": "user", "content": "..."}]'
_DEFAULTS = SamplingConfig()
# Those of one number or text, and their type.
_SIMPLE = {
    item.name: type(getattr(_DEFAULTS, item.name))
    for item in fields(SamplingConfig)
    if item.name not in ("json_schema", "schema_lenient", "logit_bias", "dry_breakers")
}
_OTHER_SETTINGS = (
    "json_schema",
    "lenient",
    "logit_bias",
    "dry_breakers",
    "max_tokens",
    "stop",
    "ignore_eos",
    "gate",
    "lookup",
)


@dataclass(frozen=True)
class Request:
    """What to answer and how; `extra` is what the result's shape needs of it."""

    messages: tuple[Message, ...]
    generation: GenerationConfig
    options: ChatOptions = field(default_factory=ChatOptions)
    extra: Mapping[str, Any] = field(default_factory=dict)


def find_identifier(record: Mapping[str, Any], name: str) -> str | None:
    """The record's id as text, None if it has none.

    Raises PromptError for one that is neither a number without fraction nor a text, or is empty.
    """
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise PromptError(f"{name} is {shown(value)}", "make it a text or a whole number")
    return _text(value, name) if isinstance(value, str) else str(value)


def text_request(prompt: str, generation: GenerationConfig, options: ChatOptions) -> Request:
    """One prompt under the run's settings. Raises PromptError for an empty one."""
    return Request((Message("user", _checked_prompt(_text(prompt, "the prompt"))),), generation, options)


def own_request(
    record: Mapping[str, Any], generation: GenerationConfig, options: ChatOptions, vocabulary_size: int
) -> Request:
    """A line of ours. Raises PromptError, UsageError or GrammarError for one that cannot be answered as it asks."""
    if ("prompt" in record) == ("messages" in record):
        problem = "both prompt and messages" if "prompt" in record else "neither prompt nor messages"
        raise PromptError(f"the line has {problem}", _NO_PROMPT)
    if "prompt" in record:
        messages: tuple[Message, ...] = (Message("user", _checked_prompt(_text(record["prompt"], "prompt"))),)
    else:
        messages = _messages(record["messages"])
    settings = {key: value for key, value in record.items() if key not in ("id", "prompt", "messages", "metadata")}
    options = _taken_options(settings, options)
    _refuse_unknown(settings, (*_SIMPLE, *_OTHER_SETTINGS), "put data of your own into metadata")
    return Request(messages, _generation(settings, generation, vocabulary_size), options)


def openai_request(
    record: Mapping[str, Any], generation: GenerationConfig, options: ChatOptions, vocabulary_size: int
) -> Request:
    """A line of an OpenAI batch (platform.openai.com/docs/api-reference/batch), llama.cpp's settings allowed too.

    Raises PromptError, UsageError or GrammarError for one that cannot be answered as it asks.
    """
    body = _openai_body(record)
    for name, neutral in _NEUTRAL.items():
        # For Python, not for JSON, 1 is true.
        if name in body and (body[name] != neutral or type(body[name]) is not type(neutral)):
            raise PromptError(f"{name} is {shown(body[name])}, which is not possible here", f"leave {name} out")
    extra = {"model": _text(body["model"], "model")} if "model" in body else {}
    settings = {key: value for key, value in body.items() if key not in ("model", "messages", *_IGNORED, *_NEUTRAL)}
    limits = [settings.pop(name) for name in ("max_tokens", "max_completion_tokens") if name in settings]
    if limits:
        if limits[-1] != limits[0]:
            raise PromptError("max_tokens and max_completion_tokens differ", "give one of them")
        settings["max_tokens"] = limits[0]
    if "response_format" in settings:
        schema = response_schema(settings.pop("response_format"))
        if schema is not None and "json_schema" in settings:
            raise PromptError("both response_format and json_schema are given", "give only one of them")
        if schema is not None:
            settings["json_schema"] = schema
    options = _taken_options(settings, options)
    _refuse_unknown(settings, (*_SIMPLE, *_OTHER_SETTINGS), "it might change the answer; leave it out")
    return Request(_messages(body["messages"]), _generation(settings, generation, vocabulary_size), options, extra)


def _openai_body(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("custom_id") is None:
        raise PromptError("the request has no custom_id", _NO_REQUEST)
    for name, only in (("method", "POST"), ("url", OPENAI_URL)):
        if record.get(name, only) != only:
            raise PromptError(f"{name} is {shown(record[name])}", f"only {only} is possible")
    _refuse_unknown(given(record), ("custom_id", "method", "url", "body"), _NO_REQUEST)
    body = record.get("body")
    if not isinstance(body, dict) or body.get("messages") is None:
        raise PromptError(f"the request has no {'messages' if isinstance(body, dict) else 'body'}", _NO_REQUEST)
    return given(body)


def with_shared_text(messages: Sequence[Message], context: str, system: str | None) -> tuple[Message, ...]:
    """Put `context` before the first message of the user, and `system` first if no system message is there.

    Raises PromptError if there is a context, but no message of the user.
    """
    changed = list(messages)
    if context:
        place = next((at for at, message in enumerate(changed) if message.role == "user"), None)
        if place is None:
            raise PromptError("there is no message of the user for the context", "add one")
        whole = context.rstrip("\n") + "\n\n" + changed[place].content
        changed[place] = Message("user", whole)
    if system is not None and changed[0].role != "system":
        changed.insert(0, Message("system", system))
    return tuple(changed)


def _generation(settings: Mapping[str, Any], base: GenerationConfig, vocabulary_size: int) -> GenerationConfig:
    """`base` with the line's settings, checked as those of the command line are."""
    sampling: dict[str, Any] = {}
    answer: dict[str, Any] = {}
    for name, value in given(settings).items():
        if name == "ignore_eos":
            answer[name] = _simple(value, name, bool)
        elif name == "stop":
            answer[name] = _stop(value)
        elif name == "gate":
            answer[name] = check_gate(value)
        elif name == "lookup":
            answer[name] = check_lookup(value)
        elif name == "max_tokens":
            answer[name] = _limit(value)
        elif name == "lenient":
            sampling["schema_lenient"] = _simple(value, name, bool)
        else:
            sampling[name] = _sampling(name, value)
    if any(kind in sampling for kind in KINDS):
        # What the line brings takes the place of the run's.
        sampling = {**dict.fromkeys(KINDS, ""), **sampling}
    if sampling:
        sampled = replace(base.sampling, **sampling)
        _check(sampled, vocabulary_size)
        answer["sampling"] = sampled
    return replace(base, **answer) if answer else base


def _taken_options(settings: dict[str, Any], base: ChatOptions) -> ChatOptions:
    """`base` with the options among the line's settings, which are taken out of them."""
    own = given({name: settings.pop(name) for name in OPTIONS if name in settings})
    try:
        return chat_options(own, base)
    except UsageError as error:
        raise PromptError(error.message.replace("`", ""), error.hint.replace("`", "")) from None


def _sampling(name: str, value: Any) -> Any:
    """The value of a field of SamplingConfig."""
    if name == "json_schema":
        # Its properties are generated in the order in which they are written.
        return _text(value, name) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if name == "logit_bias":
        return _biases(value)
    if name == "dry_breakers":
        return _texts(value, name)
    simple = _simple(value, name, _SIMPLE[name])
    return _native_seed(simple) if name == "seed" else simple


def _check(sampling: SamplingConfig, vocabulary_size: int) -> None:
    try:
        check_sampling(sampling, vocabulary_size)
    except AbcliError as error:
        raise PromptError(f"a setting of the line cannot be used: {error.message}", error.hint) from None


def _messages(value: Any) -> tuple[Message, ...]:
    messages = []
    for number, message in enumerate(read_messages(value), 1):
        others = message.reasoning_content + message.name + "".join(call.name for call in message.tool_calls)
        _text(others, f"message {number}")
        messages.append(replace(message, content=_text(message.content, f"the content of message {number}")))
    return tuple(messages)


def _simple(value: Any, name: str, kind: type) -> Any:
    if kind is str:
        return _text(value, name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # The largest have no float; every setting's range refuses an infinite one.
        return float(value) if abs(value) < 2**63 else math.inf
    if type(value) is not kind:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise PromptError(f"{name} is {shown(value)}", f"make it {wanted}")
    return value


def _native_seed(seed: int) -> int:
    """A seed for llama.cpp: OpenAI's have 64 bits and a sign; -1 leaves it to the run, as in llama.cpp."""
    return seed if seed == -1 else seed % NATIVE_RANDOM_SEED


def _limit(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise PromptError(f"max_tokens is {shown(value)}", "choose 0 or more, or -1 for no limit")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = _texts([value] if isinstance(value, str) else value, "stop")
    if not all(stops):
        raise PromptError("a stop string is empty", "give it some text, or leave it out")
    return stops


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """OpenAI's and llama.cpp's {"token": bias}, in which false forbids a token."""
    if not isinstance(value, dict) or not all(token.isascii() and token.isdecimal() for token in value):
        raise PromptError(f"logit_bias is {shown(value)}", 'write it like {"15043": -1.5}')
    return tuple(
        (int(token[:10]), -math.inf if bias is False else _simple(bias, f"the bias of token {token[:10]}", float))
        for token, bias in value.items()
    )


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise PromptError(f"{name} is {shown(value)}", "make it a list of texts")
    return tuple(_text(item, name) for item in value)


def _text(value: Any, name: str) -> str:
    """A text that a tokenizer can read. A byte order mark is dropped."""
    text = read_text(value, name)
    if "\0" in text:
        raise PromptError(f"{name} has a NUL character at {text.index(chr(0)):,}", "remove it")
    return text.removeprefix("\ufeff")


def _checked_prompt(text: str) -> str:
    if not text.strip():
        raise PromptError("the prompt is empty", "give it some text")
    return text


def _refuse_unknown(record: Mapping[str, Any], known: Sequence[str], hint: str) -> None:
    unknown = [name for name in record if name not in known]
    if unknown:
        raise PromptError(f"the field {shown(unknown[0])} is not known", hint)
