"""The tiny model, loaded once per module, as for the tests of `native`."""

from tests.native.conftest import model

__all__ = ["model"]
