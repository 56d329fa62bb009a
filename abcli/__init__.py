"""abcli: local language models whose attention overlooks nothing (Attention Buckets on llama.cpp)."""

from __future__ import annotations

__version__ = "0.1.0"
