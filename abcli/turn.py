"""Whose turn it is to compute with a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from abcli.errors import UsageError


class Turn:
    """Whose turn it is to compute: one thread at a time; the one that computes cannot begin something else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text_lock = threading.RLock()
        self._owner: int | None = None
        self._closed = False

    @property
    def taken(self) -> bool:
        """Whether anything is being computed."""
        return self._lock.locked()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn and keep it. Raises UsageError for the thread that has it, or if all is closed."""
        if self._owner == threading.get_ident():
            raise UsageError("an answer is still being streamed in this thread", "read it to its end, or close it")
        with self._lock:
            self._check_open()
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    @contextmanager
    def text(self) -> Iterator[None]:
        """Keep the model open while its vocabulary is read, which may go on beside a computation.

        One thread at a time, which may do so again within. Raises UsageError if all is closed.
        """
        with self._text_lock:
            self._check_open()
            yield

    @contextmanager
    def last(self) -> Iterator[None]:
        """Wait for the turn, unless it is the thread's own, and let nobody have it any more."""
        mine = self._owner == threading.get_ident()
        if not mine:
            self._lock.acquire()
        try:
            with self._text_lock:
                self._closed = True
                yield
        finally:
            if not mine:
                self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the model is closed", "load it again")
