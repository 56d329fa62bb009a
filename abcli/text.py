"""Words that several rooms put together."""

from __future__ import annotations

_GIB = 1 << 30


def counted(count: int, what: str) -> str:
    """A number of things for people: "1 bucket", "6 buckets", "1,000 buckets"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def gibibytes(size: int) -> str:
    """A number of bytes for people, in binary units: "1.5 GiB", "20 MiB"."""
    if size >= _GIB:
        return f"{size / _GIB:.1f} GiB" if size < 10 * _GIB else f"{size / _GIB:,.0f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"
