"""The memory that an engine takes: that of a process of its own (`python -m abcli.bench.resident`)."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from abcli.bench.contenders import Text
from abcli.config import EngineConfig, LoraConfig
from abcli.engine.make import make_engine
from abcli.engine.memory import free_room, predict
from abcli.gguf.header import Header
from abcli.gguf.lora import check_model
from abcli.native.model import Model

_NEW_TOKENS = 2
# Reading the weights from a slow disk is part of it.
_PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Memory:
    """Bytes: what is predicted at most, and what was measured, None where that was not possible.

    `resident` is that of a whole process with the model and the engine, after a prompt and two tokens; `device` is
    what less is free on devices.
    """

    predicted: int
    resident: int | None = None
    device: int | None = None


def measure_memory(config: EngineConfig, header: Header, prompt_tokens: int) -> Memory:
    """The memory of the engine `config.engine` ("contexts" or "fused"), measured where that is possible.

    What is predicted not to fit is not tried, unless `config.force`.
    """
    prediction = predict(config, header)
    if not config.force and not prediction.fits(free_room(config)):
        return Memory(prediction.total)
    asked = {
        "config": {
            **asdict(config),
            "model": str(config.model.absolute()),
            "lora": [(str(lora.path.absolute()), lora.scale) for lora in config.lora],
        },
        "prompt_tokens": prompt_tokens,
    }
    with suppress(subprocess.SubprocessError, OSError, ValueError, KeyError, TypeError):
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=True,
            timeout=_PATIENCE_SECONDS,
            # `-m` searches the working directory first: a stranger's directory must not provide modules.
            cwd=Path(__file__).parents[2],
            # Ctrl-C reaches the parent alone, which then ends the child.
            start_new_session=True,
        )
        found = json.loads(done.stdout)
        return Memory(prediction.total, int(found["resident"]), int(found["device"]))
    return Memory(prediction.total)


def main() -> None:
    """The child: make the engine that standard input describes, use it, and print what it takes."""
    asked: dict[str, Any] = json.load(sys.stdin)
    given = asked["config"]
    loras = tuple(LoraConfig(Path(path), scale) for path, scale in given["lora"])
    config = EngineConfig(**given | {"model": Path(given["model"]), "bases": tuple(given["bases"]), "lora": loras})
    header = check_model(config.model, config.lora)
    free = free_room(config).device
    with (
        Model(config.model, config.gpu_layers, header.adapters) as model,
        make_engine("fused" if config.engine == "fused" else "contexts", model, config, header) as engine,
    ):
        prompt = max(1, min(asked["prompt_tokens"], config.context_size - _NEW_TOKENS))
        text = Text.random(prompt, _NEW_TOKENS, model.vocabulary_size)
        engine.prefill(0, text.prompt)
        for token in text.answer:
            engine.step({0: token})
        resident = psutil.Process().memory_info().rss
        device = max(0, free - free_room(config).device)
    sys.stdout.write(json.dumps({"resident": resident, "device": device}))


if __name__ == "__main__":
    main()
