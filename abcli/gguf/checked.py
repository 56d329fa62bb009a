"""A model that has been looked at: its files, and the adapters that change it, all found fit for llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from abcli.config import UNTUNED, HeadNumbers, ModelConfig, Tuning
from abcli.errors import UnsupportedModelError
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint
from abcli.gguf.header import Header
from abcli.gguf.lora import Adapter, check_adapters


@dataclass(frozen=True)
class CheckedModel:
    """What the files of a model say; `parts` are the headers of the other files of a split one."""

    config: ModelConfig
    header: Header
    parts: tuple[Header, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    """Those of scale 0 are left out."""
    tuning: Tuning = UNTUNED
    """What is changed in its heads; nothing that would leave them as they are."""

    @property
    def path(self) -> Path:
        """The model's file, the first one of a split model."""
        return self.header.path

    @property
    def name(self) -> str:
        """What to call the model: its file's name, and those of its adapters."""
        return " + ".join([self.path.name, *(adapter.label for adapter in self.adapters)])

    @property
    def files(self) -> tuple[Header, ...]:
        """The headers of the model's own files."""
        return (self.header, *self.parts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without the adapters'."""
        return sum(header.weight_bytes for header in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the model computes; see `abcli.gguf.fingerprint`. Raises OSError."""
        return fingerprint(self.files, self.adapters, self.tuning)

    def with_tuning(self, tuning: Tuning) -> CheckedModel:
        """The model with this tuning, where numbers of 1 are none. Raises UnsupportedModelError if it does not fit."""
        for what, numbers, heads in (
            ("heads", tuning.gains, self.header.heads),
            ("heads of keys", tuning.multipliers, self.header.kv_heads),
        ):
            if numbers and tuple(map(len, numbers)) != heads:
                raise UnsupportedModelError(
                    f"{self.name} has {len(heads)} layers of {max(heads)} {what}, and the tuning is for {len(numbers)} "
                    f"of {max(map(len, numbers))}",
                    "use a profile that was tuned for this model",
                )
        if tuning.multipliers and self.header.compresses_keys:
            raise UnsupportedModelError(
                f"{self.name} keeps compressed keys and values (MLA), whose heads share their rotation",
                "use a profile without bases of heads",
            )

        def changing(numbers: HeadNumbers) -> HeadNumbers:
            return numbers if any(number != 1 for layer in numbers for number in layer) else ()

        return replace(self, tuning=Tuning(changing(tuning.gains), changing(tuning.multipliers)))


def check_model(config: ModelConfig, *, embeds: bool = False) -> CheckedModel:
    """Check the model of `config` with all its files and adapters.

    Raises ModelFileError for files that are missing, unreadable, foreign, truncated or damaged, UnsupportedModelError
    for a sound file that is no model which writes text, or with `embeds` makes embeddings, or an adapter that does not
    fit.
    """
    header, *parts = check_file(config.path, embeds=embeds)
    return CheckedModel(config, header, tuple(parts), check_adapters([header, *parts], config.lora))
