"""The tiny model, loaded once per module."""

from __future__ import annotations

import pytest

from abcli.native.model import Model


@pytest.fixture(scope="module")
def model(tiny_model):
    with Model(tiny_model) as opened:
        yield opened
