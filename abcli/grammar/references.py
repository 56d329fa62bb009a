"""What the `$ref`s of a JSON schema mean; nothing is ever fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from abcli.errors import GrammarError

_SCHEMAS = (
    *("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_LONGEST_PLACE = 200
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_$-]{1,80}")


@dataclass(frozen=True)
class Target:
    """A schema within the schema: where it stands, and the URI that its own references start from."""

    schema: Any
    place: str
    base: str


def inside(place: str, key: str | int) -> str:
    """The place of a member, in the notation of JSONPath: `$.properties.a[0]`."""
    if len(place) > _LONGEST_PLACE:
        return place if place.endswith("...") else f"{place}..."
    if isinstance(key, int):
        return f"{place}[{key}]"
    if _PLAIN_NAME.fullmatch(key):
        return f"{place}.{key}"
    shown = json.dumps(key if len(key) <= 60 else f"{key[:60]}...")
    return f"{place}[{shown}]"


def base_of(schema: Any, base: str) -> str:
    """The URI that references within `schema` start from."""
    identifier = schema.get("$id") if isinstance(schema, dict) else None
    if not isinstance(identifier, str) or identifier.startswith("#"):
        return base
    return urldefrag(_joined(base, identifier)).url


class References:
    """The schemas that one schema contains, by the names that references use."""

    def __init__(self, root: Any) -> None:
        self._resources: dict[str, Target] = {}
        self._anchors: dict[tuple[str, str], Target] = {}
        self._resources[""] = Target(root, "$", base_of(root, ""))
        waiting = [Target(root, "$", "")]
        while waiting:
            outer = waiting.pop()
            if not isinstance(outer.schema, dict):
                continue
            target = Target(outer.schema, outer.place, base_of(outer.schema, outer.base))
            self._name(target)
            for place, member in _members(target):
                waiting.append(Target(member, place, target.base))

    def _name(self, target: Target) -> None:
        if isinstance(target.schema.get("$id"), str):
            self._resources.setdefault(target.base, target)
        old = target.schema.get("$id")
        anchors = [target.schema.get("$anchor"), old[1:] if isinstance(old, str) and old.startswith("#") else None]
        for anchor in anchors:
            if isinstance(anchor, str):
                self._anchors.setdefault((target.base, anchor), target)

    def find(self, reference: str, base: str, place: str) -> Target:
        """What a `$ref` in a schema with this base means. Raises GrammarError where the schema does not contain it."""
        url, fragment = urldefrag(_joined(base, reference))
        if reference.startswith("#"):
            url = base
        fragment = unquote(fragment)
        resource = self._resources.get(url)
        if resource is None:
            raise GrammarError(
                f"the JSON schema refers to something outside itself: {reference[:200]!r} at {place}",
                'copy it into "$defs" and refer to "#/$defs/NAME"',
            )
        found: Target | None = resource
        if fragment.startswith("/"):
            found = _pointed_at(resource, fragment)
        elif fragment:
            found = self._anchors.get((resource.base, fragment))
        if found is None or not isinstance(found.schema, dict | bool):
            raise GrammarError(
                f"the JSON schema refers to {reference[:200]!r} at {place}, "
                f"{'which it does not contain' if found is None else 'which is no schema'}",
                "define it, or correct the reference",
            )
        return found


def _members(target: Target) -> Iterator[tuple[str, Any]]:
    for key in _SCHEMAS:
        if isinstance(target.schema.get(key), dict):
            yield inside(target.place, key), target.schema[key]
    for key in _LISTS:
        if isinstance(target.schema.get(key), list):
            for index, member in enumerate(target.schema[key]):
                yield inside(inside(target.place, key), index), member
    for key in _NAMED:
        if isinstance(target.schema.get(key), dict):
            for name, member in target.schema[key].items():
                yield inside(inside(target.place, key), name), member


def _pointed_at(resource: Target, pointer: str) -> Target | None:
    """RFC 6901, from the resource on; a schema with an `$id` on the way changes the base."""
    value, place, base = resource.schema, resource.place, resource.base
    for part in pointer.split("/")[1:]:
        key: str | int = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and isinstance(key, str) and key.isdecimal() and int(key[:9]) < len(value):
            key = int(key)
        elif not isinstance(value, dict) or key not in value:
            return None
        value, place = value[key], inside(place, key)
        base = base_of(value, base)
    return Target(value, place, base)


def _joined(base: str, reference: str) -> str:
    try:
        return urljoin(base, reference)
    except ValueError:
        return reference
