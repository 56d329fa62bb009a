"""What two texts of a template have in common, without taking tags apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import takewhile

_TAG = re.compile(r"<\|open\|>\w+<\|sep\|>|<\|close\|>\w+<\|sep\|>|<[^<>\s][^<>]*>|\[/?[A-Z][A-Z_ ]*\]")
_FIRST = re.compile(rf"\s*({_TAG.pattern})")


def shared_beginning(texts: Iterable[str]) -> str:
    """The longest text that all begin with."""
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in same)


def shared_end(texts: Iterable[str]) -> str:
    """The longest text that all end with."""
    return shared_beginning(text[::-1] for text in texts)[::-1]


def common_beginning(first: str, second: str) -> str:
    """The longest text that both begin with and that ends in no tag."""
    length = len(shared_beginning([first, second]))
    if length in (len(first), len(second)):
        return first[:length]
    opened = first.rfind("<", 0, length)
    if opened > first.rfind(">", 0, length):
        length = opened
    return first[: next((tag.start() for tag in _TAG.finditer(first) if tag.start() < length < tag.end()), length)]


def common_end(first: str, second: str) -> str:
    """The longest text that both end with and that begins in no tag."""
    start = len(first) - len(shared_end([first, second]))
    if len(first) - start in (len(first), len(second)):
        return first[start:]
    closed, opened = first.find(">", start), first.find("<", start)
    if closed >= 0 and (opened < 0 or closed < opened):
        start = closed + 1
    return first[next((tag.end() for tag in _TAG.finditer(first) if tag.start() < start < tag.end()), start) :]


def tags(text: str) -> list[str]:
    """The tags in a text."""
    return [tag.group() for tag in _TAG.finditer(text)]


def first_tag(text: str) -> str:
    """The tag that a text begins with, empty if there is none."""
    found = _FIRST.match(text)
    return found.group(1) if found else ""


def last_tag(text: str) -> str:
    """The tag that a text ends with, empty if there is none."""
    # The last of them, since what is before a tag may be one too.
    found = [match.group() for match in _TAG.finditer(text.rstrip())]
    return found[-1] if found and text.rstrip().endswith(found[-1]) else ""
