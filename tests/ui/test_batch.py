from __future__ import annotations

import io

from abcli.batch.progress import RunProgress, Summary, shard_size, summarise
from abcli.batch.scheduler import StopSwitch, Totals
from abcli.ui.batch import batch_progress, progress_text, summary_text
from abcli.ui.terminal import Terminal


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_one_line_a_minute_where_nobody_watches() -> None:
    clock, errors = Clock(), io.StringIO()
    progress, totals = RunProgress(400), Totals()
    switch = StopSwitch(lambda: None)
    with batch_progress(Terminal(io.StringIO(), errors), progress, totals, switch, bar=True, clock=clock) as show:
        for _ in range(150):
            clock.now += 1.0
            progress.written += 1
            totals.completion_tokens += 50
            show()
    assert errors.getvalue().splitlines() == [
        "batch: 60 of 400 lines, 50.0 tokens/s, 0 errors, about 5 min left",
        "batch: 120 of 400 lines, 50.0 tokens/s, 0 errors, about 4 min left",
    ]


def test_the_stop_is_told_once() -> None:
    errors = io.StringIO()
    switch = StopSwitch(lambda: None)
    with batch_progress(Terminal(io.StringIO(), errors), RunProgress(None), Totals(), switch, bar=False) as show:
        show()
        switch.press()
        show()
        show()
    assert errors.getvalue() == "finishing what is begun; once more stops at once\n"


def test_what_is_not_known_is_not_said() -> None:
    assert progress_text(RunProgress(None, written=3), 0, 0.0, None) == "3 lines, 0 errors"
    assert progress_text(RunProgress(4, skipped=1, written=2, errors=1), 30, 2.0, 90.0) == (
        "3 of 4 lines, 15.0 tokens/s, 1 error, about 1 min left"
    )


def summary(**changes: int) -> Summary:
    progress = RunProgress(12, written=10, errors=2)
    totals = Totals(prompt_tokens=2000, completion_tokens=400)
    for name, value in changes.items():
        setattr(progress if hasattr(progress, name) else totals, name, value)
    return summarise(progress, totals, 8.0, finished=True)


def test_the_summary_in_a_line() -> None:
    assert summary_text(summary()) == (
        "8 answers, 2 errors | 2,000 prompt tokens | 400 new tokens in 8.0 s, 50.0 tokens/s"
    )
    assert summary_text(summary(skipped=5, duplicates=3, cached_tokens=700)) == (
        "8 answers, 2 errors, 5 done before, 3 of the answers for prompts that came again"
        " | 2,000 prompt tokens (700 shared) | 400 new tokens in 8.0 s, 50.0 tokens/s"
    )


def test_the_parts_of_all_shards_are_the_whole() -> None:
    for total in range(20):
        for count in range(1, 6):
            assert sum(shard_size(total, (part, count)) or 0 for part in range(1, count + 1)) == total
    assert shard_size(None, (1, 2)) is None
    assert shard_size(7, None) == 7
