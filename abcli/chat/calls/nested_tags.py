"""Values that are written as tags within tags, each named after its key, as MiniMax M3 does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from abcli.chat.calls.format import Tags
from abcli.chat.calls.values import value_text

# What the members of a list are called.
_ITEM = "item"
_DEEPEST = 64


def nested_value(written: str, tags: Tags, schema: Any, depth: int = _DEEPEST) -> str:
    """The JSON of a value: tags in it are the members of an object, or of a list if that is what they are called."""
    members = _members(written.strip(), tags) if depth else None
    if not members:
        return value_text(written, schema)
    if all(key == _ITEM for key, _ in members):
        items = _part(schema, "items")
        return f"[{', '.join(nested_value(value, tags, items, depth - 1) for _, value in members)}]"
    properties = _part(schema, "properties")
    parts = (
        f"{json.dumps(key, ensure_ascii=False)}: {nested_value(value, tags, _part(properties, key), depth - 1)}"
        for key, value in members
    )
    return f"{{{', '.join(parts)}}}"


def _members(written: str, tags: Tags) -> list[tuple[str, str]] | None:
    """(key, what is written for it) of all tags in a text, None if it is anything but tags."""
    begin = re.compile(rf"\s*{re.escape(tags.key_begin)}([^<>/]+){re.escape(tags.key_end)}")
    members, at = [], 0
    while at < len(written):
        opened = begin.match(written, at)
        if opened is None:
            return None
        end = tags.end_of(opened.group(1)).strip()
        closed = _end_of(written, opened.end(), opened.group().strip(), end)
        if closed < 0:
            return None
        members.append((opened.group(1), written[opened.end() : closed]))
        at = closed + len(end)
    return members


def _end_of(written: str, at: int, opening: str, end: str) -> int:
    """Where the tag that was opened before `at` is closed, tags of the same name within it left out; -1 if nowhere."""
    depth = 1
    for found in re.finditer(f"{re.escape(opening)}|{re.escape(end)}", written[at:]):
        depth += 1 if found.group() == opening else -1
        if depth == 0:
            return at + found.start()
    return -1


def _part(schema: Any, key: str) -> Any:
    return schema.get(key) if isinstance(schema, Mapping) else None
