"""Stand-ins for a tokenizer, and where a depth belongs."""

from __future__ import annotations

import re


def count_pieces(text: str) -> int:
    """Words, single digits and marks: like a tokenizer, uneven over identifiers."""
    return len(re.findall(r"[^\W\d]+|\d|[^\w\s]", text))


def count_bytes(text: str) -> int:
    return len(text.encode())


def nearest(depth: float, depths: int) -> int:
    """The index of the nearest of `depths` even depths."""
    return min(range(depths), key=lambda index: abs(index / max(depths - 1, 1) - depth))
