"""The tiny model, loaded once per module."""

from __future__ import annotations

import pytest

from tests.support.models import open_model


@pytest.fixture(scope="module")
def model(tiny_model):
    with open_model(tiny_model) as opened:
        yield opened
