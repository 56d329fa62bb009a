"""A run of a batch: which jobs are left, their results into the output, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from abcli.batch.jobs import BadLine, Job, Result
from abcli.batch.scheduler import Totals
from abcli.batch.writing import Output


@dataclass
class RunProgress:
    """How far a run is. `total` is the number of jobs and bad lines it has to do, None if that is not known."""

    total: int | None
    skipped: int = 0
    """Results that an earlier run has left in the output."""
    skipped_errors: int = 0
    """How many of these are bad lines."""
    written: int = 0
    errors: int = 0

    @property
    def done(self) -> int:
        """What need not be done any more."""
        return self.skipped + self.written


@dataclass(frozen=True)
class Summary:
    """What a run did: numbers of lines and tokens, seconds, and new tokens per second."""

    finished: bool
    """Whether nothing is left to do."""
    lines: int | None
    skipped: int
    skipped_errors: int
    written: int
    errors: int
    duplicates: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    tokens_per_second: float

    def report(self) -> dict[str, Any]:
        """The summary as --summary writes it."""
        return asdict(self) | {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
        }


def shard_size(total: int | None, shard: tuple[int, int] | None) -> int | None:
    """How many of `total` lines belong to shard (I, N), see `in_shard`; None if the total is not known."""
    if total is None or shard is None:
        return total
    return len(range(shard[0] - 1, total, shard[1]))


def left_to_do(
    items: Iterable[Job | BadLine], is_done: Callable[[Job | BadLine], bool], progress: RunProgress
) -> Iterator[Job | BadLine]:
    """What of `items` has no result yet; the others are counted in `progress`."""
    for item in items:
        if is_done(item):
            progress.skipped += 1
            progress.skipped_errors += isinstance(item, BadLine)
        else:
            yield item


def write_results(
    results: Iterable[Result],
    output: Output,
    progress: RunProgress,
    *,
    fail_fast: bool = False,
) -> bool:
    """Write every result as it comes; False if the first error ended it (`fail_fast`).

    Where the results are made does not matter: by this process's scheduler, or by others. Raises what making and
    writing them raises; what is written stays.
    """
    for result in results:
        output.write(result)
        progress.written += 1
        progress.errors += bool(result.error)
        if result.error and fail_fast:
            return False
    return True


class Stopwatch:
    """The seconds since it was made."""

    def __init__(self) -> None:
        self._begin = perf_counter()

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return perf_counter() - self._begin


def summarise(progress: RunProgress, totals: Totals, seconds: float, *, finished: bool) -> Summary:
    """The summary of a run that took `seconds`."""
    return Summary(
        finished=finished,
        lines=progress.total,
        skipped=progress.skipped,
        skipped_errors=progress.skipped_errors,
        written=progress.written,
        errors=progress.errors,
        duplicates=totals.duplicates,
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.cached_tokens,
        completion_tokens=totals.completion_tokens,
        seconds=seconds,
        tokens_per_second=totals.completion_tokens / seconds if seconds > 0 else 0.0,
    )
