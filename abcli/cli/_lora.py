"""The flag --lora: which LoRA adapters change the model, and how much."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from abcli.cli._flags import flag
from abcli.config import LoraConfig
from abcli.errors import UsageError
from abcli.hub.locate import is_file

# What follows the last colon of FILE:SCALE; anything else belongs to the file's name.
_NUMBER = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?)", re.ASCII | re.IGNORECASE)

LoraFlag = Annotated[
    list[str] | None,
    flag(
        "LoRA adapter in GGUF, counted SCALE (1) times; repeatable.", "--lora", "--lora-scaled", metavar="FILE[:SCALE]"
    ),
]


def parse_loras(words: Sequence[str] | None) -> tuple[LoraConfig, ...]:
    """The adapters that the words of --lora mean. Raises UsageError for an impossible scale, or a file given twice."""
    found = tuple(parse_lora(word) for word in words or ())
    seen: set[str] = set()
    for lora in found:
        real = os.path.realpath(lora.path)
        if real in seen:
            raise UsageError(f"--lora {lora.path} is given twice", "give it once, with the sum of the scales")
        seen.add(real)
    return found


def parse_lora(word: str) -> LoraConfig:
    """FILE or FILE:SCALE; a file that exists wins, and only a number is a scale. Raises UsageError."""
    path, colon, number = word.rpartition(":")
    if is_file(word) or not (path and colon and _NUMBER.fullmatch(number)):
        return LoraConfig(_path(word))
    try:
        # As llama.cpp takes it; raises OverflowError beyond float32.
        (scale,) = struct.unpack("<f", struct.pack("<f", float(number)))
    except OverflowError:
        scale = float("inf")
    if not abs(scale) < float("inf"):
        raise UsageError(f"--lora {word}: the scale {number} is impossible", "give a finite number, such as 0.5")
    return LoraConfig(_path(path), scale)


def _path(word: str) -> Path:
    try:
        return Path(word).expanduser()
    except RuntimeError:  # no such user after ~
        return Path(word)
