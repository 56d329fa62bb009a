"""A chat session and its JSON form, strict about what it accepts."""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from abcli.chat.message_format import message_fields, read_messages
from abcli.chat.messages import Message
from abcli.config import MERGE_RULES, MergeRule
from abcli.errors import PromptError, UsageError
from abcli.sampling import SamplingConfig

FORMAT = "abcli-session"
FORMAT_VERSION = 1
MAX_NAME = 100

# Letters of every script with the marks on them, and digits: the first letters of their Unicode categories.
_WORD = ("L", "M", "N")
# File systems allow 255 bytes; the lock's name is the longest, and adds ten.
_MAX_NAME_BYTES = 240


class FormatError(Exception):
    """Why some bytes are not a session, as a phrase that continues "FILE ..."."""


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Session:
    """A saved chat. `model` names its file, and adapters, and `model_size` is their bytes: another is noticed."""

    name: str
    model: str = ""
    model_size: int = 0
    bases: tuple[float, ...] = ()
    merge: MergeRule = "confidence"
    messages: list[Message] = field(default_factory=list)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    created: str = field(default_factory=utc_now)
    updated: str = field(default_factory=utc_now)


def check_name(name: str) -> str:
    """`name` in the one spelling (Unicode's NFC) that counts, if a session may be called so. Raises UsageError."""
    spelled = unicodedata.normalize("NFC", name)
    fits = 0 < len(spelled) <= MAX_NAME and len(spelled.encode("utf-8", "replace")) <= _MAX_NAME_BYTES
    known = all(letter in "-_. " or unicodedata.category(letter).startswith(_WORD) for letter in spelled)
    if not (fits and known) or spelled.startswith(".") or spelled != spelled.strip():
        raise UsageError(
            f"{name!r:.120} cannot be the name of a session",
            f"use up to {MAX_NAME} letters, digits, '-', '_', '.' and blanks, no '.' in front and no blank at the ends",
        )
    return spelled


def encode_session(session: Session) -> bytes:
    """`session` as JSON. Raises FormatError for a text that is not valid Unicode."""
    values = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(session)}
    values["messages"] = [message_fields(message) for message in session.messages]
    try:
        return (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"would hold text that is not valid Unicode: {error.object[error.start]!r}") from None


def decode_session(data: bytes) -> Session:
    """The session in `data`. Raises FormatError for anything that `encode_session` does not write."""
    return _session(_json(data))


def decode_conversation(data: bytes) -> Session:
    """As `decode_session`, but a list of messages, alone or as {"messages": [...]}, is a session too.

    Such a list is what OpenAI's clients send. Raises FormatError.
    """
    values = _json(data)
    if isinstance(values, dict) and "format" not in values and "messages" in values:
        values = values["messages"]
    if not isinstance(values, list):
        return _session(values)
    if not values:
        raise FormatError("holds no messages")
    return Session("", messages=_messages(values))


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FormatError(f"is not UTF-8 (at byte {error.start:,})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is damaged: {error}") from None


def _session(values: Any) -> Session:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise FormatError("is not a session of abcli")
    version = values.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(f"has session format {version!r:.20}, and this abcli reads {FORMAT_VERSION}")
    merge = _text(values, "merge")
    if merge not in MERGE_RULES:
        raise FormatError(f"is damaged: merge is {merge!r:.40}")
    try:
        # A chat that is not kept has no name when it is written to a file of the user's choice.
        name = _text(values, "name") and check_name(_text(values, "name"))
    except UsageError as error:
        raise FormatError(f"is damaged: {error.message}") from None
    return Session(
        name=name,
        model=_text(values, "model"),
        model_size=_whole_number(values, "model_size"),
        bases=tuple(_number(base, "bases") for base in _items(values, "bases")),
        merge=merge,
        messages=_messages(_items(values, "messages")),
        sampling=_sampling(values.get("sampling")),
        created=_time(values, "created"),
        updated=_time(values, "updated"),
    )


def _damaged(key: str) -> FormatError:
    return FormatError(f"is damaged: {key} has the wrong type")


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise _damaged(key)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can escape half a character, which could never be written again.
        raise FormatError(f"is damaged: {key} is not valid Unicode") from None
    return value


def _time(values: Mapping[str, Any], key: str) -> str:
    text = _text(values, key)
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise FormatError(f"is damaged: {key} is {text!r:.40}") from None
    return text


def _items(values: Mapping[str, Any], key: str) -> list[Any]:
    value = values.get(key)
    if not isinstance(value, list):
        raise _damaged(key)
    return value


def _whole_number(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _damaged(key)
    return value


def _number(value: Any, key: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _damaged(key)
    try:
        number = float(value)
    except OverflowError:
        raise _damaged(key) from None
    if math.isnan(number):
        raise _damaged(key)
    return number


def _messages(items: list[Any]) -> list[Message]:
    try:
        return list(read_messages(items)) if items else []
    except PromptError as error:
        raise FormatError(f"is damaged: {error.message}") from None


def _sampling(values: Any) -> SamplingConfig:
    if not isinstance(values, dict):
        raise _damaged("sampling")
    defaults = {item.name: getattr(SamplingConfig(), item.name) for item in dataclasses.fields(SamplingConfig)}
    unknown = sorted(values.keys() - defaults.keys())
    if unknown:
        raise FormatError(f"has a setting this abcli does not know: {unknown[0]!r:.40}")
    return SamplingConfig(**{key: _setting(values, key, defaults[key]) for key in values})


def _setting(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of one sampling setting, which must have the type of its default."""
    if key == "logit_bias":
        pairs = _items(values, key)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise _damaged(key)
        return tuple((_whole_number({key: token}, key), _number(bias, key)) for token, bias in pairs)
    if isinstance(default, tuple):
        return tuple(_text({key: item}, key) for item in _items(values, key))
    if isinstance(default, str):
        return _text(values, key)
    if isinstance(default, bool):
        if not isinstance(values[key], bool):
            raise _damaged(key)
        return values[key]
    return _whole_number(values, key) if isinstance(default, int) else _number(values[key], key)
