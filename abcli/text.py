"""Words that several rooms put together."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
    """A number of things for people: "1 bucket", "6 buckets", "1,000 buckets"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
