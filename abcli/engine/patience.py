"""A limit on the time of work that can be cancelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from time import perf_counter

from abcli.errors import AbcliError, CancelledError


class OutOfTimeError(AbcliError):
    """It took longer than it may."""


class Patience:
    """A limit on the wall time of what can be cancelled."""

    def __init__(self, what: str, seconds: float = math.inf) -> None:
        """`what` is said in the error."""
        self.what = what
        self.seconds = seconds
        self._begin = perf_counter()
        self._over = False

    def check(self) -> None:
        """Raise OutOfTimeError if the time is over."""
        if self._over or perf_counter() - self._begin > self.seconds:
            raise OutOfTimeError(f"{self.what} takes more than {self.seconds:g} s here")

    @contextmanager
    def cancelling(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Call `cancel` from another thread when the time is over; what that raises becomes the error of `check`."""
        self.check()

        def stop() -> None:
            self._over = True
            cancel()

        left = self.seconds - (perf_counter() - self._begin)
        timer = Timer(left, stop) if left < math.inf else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        except CancelledError:
            self.check()
            raise
        finally:
            if timer is not None:
                timer.cancel()
