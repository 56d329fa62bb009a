"""Lines become messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from abcli.errors import PromptError
from abcli.ui.lines import Entry, _history, read_message

BAD = PromptError("not UTF-8", "save it as UTF-8")


class Lines:
    """Gives lines one by one and remembers how it was asked."""

    def __init__(self, lines: Sequence[str | Exception]) -> None:
        self.left = list(lines)
        self.asked: list[bool] = []

    def __call__(self, continued: bool) -> str:
        self.asked.append(continued)
        if not self.left:
            raise EOFError
        line = self.left.pop(0)
        if isinstance(line, Exception):
            raise line
        return line


@pytest.mark.parametrize(
    ("lines", "expected", "left"),
    [
        (["hello", "next"], Entry("hello", False), 1),
        ([" /bye "], Entry(" /bye ", False), 0),
        ([""], Entry("", False), 0),
        (['say """'], Entry('say """', False), 0),
        (['"""one"""', "next"], Entry("one", True), 1),
        (['"""', "a", "", "b", '"""', "next"], Entry("a\n\nb", True), 1),
        (['  """a', 'b"""  '], Entry("a\nb", True), 0),
        (['"""', "  indented", '"""'], Entry("  indented", True), 0),
        (['"""', '"""'], Entry("", True), 0),
        (['"""', "a", "b"], Entry("a\nb", True), 0),
        (['"""'], Entry("", True), 0),
    ],
)
def test_messages(lines: list[str | Exception], expected: Entry, left: int) -> None:
    source = Lines(lines)
    assert read_message(source) == expected
    assert len(source.left) == left
    assert source.asked == [False] + [True] * (len(source.asked) - 1)


def test_a_block_with_a_bad_line_is_read_to_its_end() -> None:
    source = Lines(['"""', BAD, "/bye", BAD, '"""', "next"])
    with pytest.raises(PromptError):
        read_message(source)
    assert source.left == ["next"]


def test_the_end_of_the_input() -> None:
    with pytest.raises(EOFError):
        read_message(Lines([]))


def test_ctrl_c_gives_up_a_block() -> None:
    class Interrupted(Lines):
        def __call__(self, continued: bool) -> str:
            if continued:
                raise KeyboardInterrupt
            return super().__call__(continued)

    with pytest.raises(KeyboardInterrupt):
        read_message(Interrupted(['"""a']))


def test_the_history_belongs_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "home" / "history"
    _history(path).store_string("what I typed")
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(_history(path).load_history_strings()) == ["what I typed"]


def test_a_history_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file, not a directory", encoding="utf-8")
    history = _history(tmp_path / "home" / "history")
    history.append_string("what I typed")
    assert history.get_strings() == ["what I typed"]
