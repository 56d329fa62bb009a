"""What learning needs is told before it begins, and decides how it is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from abcli.errors import OutOfMemoryError
from abcli.tune.memory import needed_bytes, plan_memory
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_model


def test_memory_is_told_before(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf", layers=8))
    whole, frugal = (needed_bytes(checked, 8192, 100, frugal=frugal) for frugal in (False, True))
    weights = 4 * sum(int(np.prod(tensor.shape)) for tensor in checked.header.tensors)
    assert weights < frugal < whole / 2
    assert not plan_memory(checked, 8192, 100, whole).frugal
    plan = plan_memory(checked, 8192, 100, whole - 1)
    assert plan.frugal
    assert plan.needed == frugal
    assert "computing each layer twice" in str(plan)
    with pytest.raises(OutOfMemoryError, match="8,192 tokens at once needs"):
        plan_memory(checked, 8192, 100, frugal - 1)
