"""Models that learning would compute otherwise than llama.cpp are refused, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from abcli.config import LoraConfig
from abcli.errors import UnsupportedModelError
from abcli.gguf.checked import CheckedModel
from abcli.tune.architecture import ARCHITECTURES, check_architecture
from tests.support.lora import random_lora, write_lora
from tests.support.models import checked_model
from tests.support.tiny_gguf import Architecture, write_tiny_experts, write_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_these_are_known(tmp_path: Path, architecture: Architecture) -> None:
    check_architecture(checked_model(write_tiny_model(tmp_path / "model.gguf", architecture=architecture)))


def refused(folder: Path, case: str) -> CheckedModel:
    """A model that llama.cpp takes and the twin does not."""
    if case == "adapters":
        path = write_tiny_model(folder / "model.gguf")
        lora = write_lora(folder / "lora.gguf", random_lora(path))
        return checked_model(path, lora=[LoraConfig(lora)])
    if case == "experts":
        return checked_model(write_tiny_experts(folder / "model.gguf"))
    if case == "stablelm":
        return checked_model(write_tiny_model(folder / "model.gguf", architecture="stablelm"))
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    return checked_model(write_tiny_model(folder / "model.gguf", metadata=scaling))


REFUSED = {
    "adapters": "has adapters",
    "experts": "has a tensor blk.0.ffn_down_exps.weight",
    "stablelm": "is of the architecture stablelm",
    "yarn": "RoPE scaling of the kind yarn",
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[case]) as found:
        check_architecture(refused(tmp_path, case))
    assert "llama, qwen2, qwen3, gemma3" in found.value.hint
