"""What every class has in common that owns native handles, or what holds some."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TypeVar

_Owner = TypeVar("_Owner", bound="Owner")


class Owner:
    """Is closed when a `with` block ends: frees what its `_stack` holds, last first."""

    _stack: ExitStack

    def __enter__(self: _Owner) -> _Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._stack.close()
