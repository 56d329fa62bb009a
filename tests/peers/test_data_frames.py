"""The examples of docs/python.md with data frames, run as they stand; tests/test_python_docs.py has the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_python_docs import FRAMES, run_example

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_answers_go_into_a_frame(library: str, real_model: Path) -> None:
    assert real_model.is_file()
    pytest.importorskip(library, reason=f"{library} is missing")
    shown = run_example(FRAMES[library])
    assert all(word in shown for word in ("country", "text", "France", "Japan"))
