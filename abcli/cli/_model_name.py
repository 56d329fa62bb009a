"""The flags that say which model is meant, for every command that takes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from abcli.cli._flags import flag
from abcli.errors import UsageError
from abcli.hub.names import hub_word


@dataclass(frozen=True)
class ModelNameOptions:
    """Which model; after construction `model` has what any of the flags said."""

    panel: ClassVar[str] = "Model"

    model: Annotated[
        str | None,
        flag("GGUF file, user/repository[:quant], alias or known name; default: the default model.", "--model", "-m"),
    ] = None
    hf_repo: Annotated[
        str | None,
        flag("Model of the hub, whatever else has its name.", "--hf-repo", "-hf", metavar="USER/REPOSITORY[:QUANT]"),
    ] = None

    def __post_init__(self) -> None:
        """Let `model` say which model is meant, whichever flag named it. Raises UsageError for two."""
        if self.hf_repo is None:
            return
        if self.model is not None:
            raise UsageError(f"two models: {self.model} and {self.hf_repo}", "drop --model or --hf-repo")
        object.__setattr__(self, "model", hub_word(self.hf_repo))

    def name(self, positional: str | None) -> str | None:
        """The model's name, or None; `positional` is what was given without a flag. Raises UsageError for two."""
        if positional is not None and self.model is not None:
            raise UsageError(f"two models: {positional} and {self.model}", "drop --model or the argument")
        return self.model if positional is None else positional
