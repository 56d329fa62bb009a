"""A model that answers: from a name and settings to text, opened once for everything that stands above it."""

from abcli.llm.loading import load
from abcli.llm.model import LLM

__all__ = ["LLM", "load"]
