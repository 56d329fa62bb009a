"""What a tuned model should still say: the texts that come with abcli, a user's own, and answers that go in circles."""

from __future__ import annotations

from pathlib import Path

import pytest

from abcli.errors import EvaluationDataError
from abcli.tune.everyday import Halves, prompts, prose, repeats_itself


@pytest.mark.parametrize(("halves", "each"), [(prompts(), 50), (prose(), 6)])
def test_what_guards_does_not_check(halves: Halves, each: int) -> None:
    assert len(halves.guard) == each
    assert len(halves.check) == each
    assert len({*halves.guard, *halves.check}) == 2 * each
    assert all(text.strip() == text and text for text in (*halves.guard, *halves.check))


def test_a_users_own_text_is_cut_into_passages(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"This is sentence number {number} of a long text." for number in range(3000)))
    halves = prose(path)
    assert len(halves.guard) == len(halves.check) == 24
    assert not set(halves.guard) & set(halves.check)
    assert all(1200 <= len(text) < 1700 for text in halves.guard)
    # They are spread over all of it.
    assert "number 24" in halves.check[-1] or "number 25" in halves.check[-1]


@pytest.mark.parametrize("content", [b"", b"One sentence.", b"\xff\xfe is no text. " * 500])
def test_a_text_that_cannot_guard_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(EvaluationDataError, match=r"text\.txt"):
        prose(path)


def test_answers_that_go_in_circles_are_found() -> None:
    circle = tuple(range(12))
    assert repeats_itself(circle * 3)
    assert repeats_itself((1,) * 14)
    assert not repeats_itself(circle * 2)
    assert not repeats_itself(tuple(range(120)))
    assert not repeats_itself(())
