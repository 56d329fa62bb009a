"""The memory that an engine takes: that of a process of its own (`python -m abcli.bench.resident`)."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from abcli.bench.contenders import Text
from abcli.config import Buckets, ContextConfig, LoraConfig, ModelConfig
from abcli.engine.make import Kind, make_engine
from abcli.engine.memory import free_room, predict
from abcli.gguf.checked import CheckedModel, check_model
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


def measure_memory(model: CheckedModel, config: ContextConfig, buckets: Buckets, prompt_tokens: int) -> Memory:
    """The memory of the engine `config.engine` ("contexts" or "fused"), measured where that is possible.

    What is predicted not to fit is not tried, unless `config.force`.
    """
    prediction = predict(model, config, buckets)
    if not config.force and not prediction.fits(free_room(model.config.gpu_layers)):
        return Memory(prediction.total)
    asked = {
        "model": {
            "path": str(model.path.absolute()),
            "gpu_layers": model.config.gpu_layers,
            "lora": [(str(lora.path.absolute()), lora.scale) for lora in model.config.lora],
        },
        "context": asdict(replace(config, prompt_cache=None)),
        "buckets": asdict(buckets),
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
    given = asked["model"]
    loras = tuple(LoraConfig(Path(path), scale) for path, scale in given["lora"])
    checked = check_model(ModelConfig(Path(given["path"]), given["gpu_layers"], loras))
    config = ContextConfig(**asked["context"])
    buckets = Buckets(**{**asked["buckets"], "bases": tuple(asked["buckets"]["bases"])})
    free = free_room(checked.config.gpu_layers).device
    kind: Kind = "fused" if config.engine == "fused" else "contexts"
    with Model(checked) as model, make_engine(kind, model, config, buckets) as engine:
        prompt = max(1, min(asked["prompt_tokens"], config.context_size - _NEW_TOKENS))
        text = Text.random(prompt, _NEW_TOKENS, model.vocabulary_size)
        engine.prefill(0, text.prompt)
        for token in text.answer:
            engine.step({0: token})
        resident = psutil.Process().memory_info().rss
        device = max(0, free - free_room(checked.config.gpu_layers).device)
    sys.stdout.write(json.dumps({"resident": resident, "device": device}))


if __name__ == "__main__":
    main()
