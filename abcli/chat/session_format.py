"""A chat session and its JSON form, strict about what it accepts."""

from __future__ import annotations

import dataclasses
import json
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
from abcli.strict_json import (
    FormatError,
    boolean,
    check_version,
    items,
    mapping,
    number,
    numbers,
    one_of,
    parsed,
    refused,
    text,
    whole,
    wrong_type,
)

FORMAT = "abcli-session"
FORMAT_VERSION = 1
MAX_NAME = 100

# Letters of every script with the marks on them, and digits: the first letters of their Unicode categories.
_WORD = ("L", "M", "N")
# File systems allow 255 bytes; the lock's name is the longest, and adds ten.
_MAX_NAME_BYTES = 240


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
    return _session(parsed(data, infinite=True))


def decode_conversation(data: bytes) -> Session:
    """As `decode_session`, but a list of messages, alone or as {"messages": [...]}, is a session too.

    Such a list is what OpenAI's clients send. Raises FormatError.
    """
    values = parsed(data, infinite=True)
    if isinstance(values, dict) and "format" not in values and "messages" in values:
        values = values["messages"]
    if not isinstance(values, list):
        return _session(values)
    if not values:
        raise FormatError("holds no messages")
    return Session("", messages=_messages(values))


def _session(values: Any) -> Session:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise FormatError("is not a session of abcli")
    check_version(values.get("version"), FORMAT_VERSION, "session")
    name = text(values, "name")
    try:
        # A chat that is not kept has no name when it is written to a file of the user's choice.
        name = name and check_name(name)
    except UsageError as error:
        raise FormatError(f"is damaged: {error.message}") from None
    return Session(
        name=name,
        model=text(values, "model"),
        model_size=whole(values, "model_size"),
        bases=numbers(values, "bases"),
        merge=one_of(values, "merge", MERGE_RULES),
        messages=_messages(items(values, "messages")),
        sampling=_sampling(mapping(values, "sampling")),
        created=_time(values, "created"),
        updated=_time(values, "updated"),
    )


def _time(values: Mapping[str, Any], key: str) -> str:
    found = text(values, key)
    try:
        datetime.fromisoformat(found)
    except ValueError:
        raise refused(key, found) from None
    return found


def _messages(found: list[Any]) -> list[Message]:
    try:
        return list(read_messages(found)) if found else []
    except PromptError as error:
        raise FormatError(f"is damaged: {error.message}") from None


def _sampling(values: Mapping[str, Any]) -> SamplingConfig:
    defaults = {item.name: getattr(SamplingConfig(), item.name) for item in dataclasses.fields(SamplingConfig)}
    unknown = sorted(values.keys() - defaults.keys())
    if unknown:
        raise FormatError(f"has a setting this abcli does not know: {unknown[0]!r:.40}")
    return SamplingConfig(**{key: _setting(values, key, defaults[key]) for key in values})


def _setting(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of one sampling setting, which must have the type of its default."""
    if key == "logit_bias":
        pairs = items(values, key)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise wrong_type(values, key)
        return tuple((whole({key: token}, key), number({key: bias}, key, infinite=True)) for token, bias in pairs)
    if isinstance(default, tuple):
        return tuple(text({key: item}, key) for item in items(values, key))
    if isinstance(default, str):
        return text(values, key)
    if isinstance(default, bool):
        return boolean(values, key)
    return whole(values, key) if isinstance(default, int) else number(values, key, infinite=True)
