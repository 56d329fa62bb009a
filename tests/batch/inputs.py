"""Input files for the tests, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abcli.batch.jobs import BadLine, Job
from abcli.batch.reading import InputParts, JobReader
from abcli.sampling import GenerationConfig, SamplingConfig

RUN = GenerationConfig(SamplingConfig(seed=7, temperature=0.5), max_tokens=9)
OWN = {"id": "a", "prompt": "p"}
OTHER = {"question": "q"}


def write(directory: Path, content: str | bytes | list[Any], name: str = "input") -> Path:
    path = directory / name
    if isinstance(content, list):
        content = "".join(json.dumps(value) + "\n" for value in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jobs(path: Path, **options: Any) -> list[Job | BadLine]:
    names = InputParts.__dataclass_fields__
    parts = InputParts(**{name: options.pop(name) for name in names if name in options})
    return list(JobReader(path, parts, options.pop("defaults", RUN), **options))


def job(path: Path, **options: Any) -> Job:
    (found,) = jobs(path, **options)
    assert isinstance(found, Job), found
    return found


def prompts(found: list[Job | BadLine]) -> list[str]:
    return [item.messages[-1].content if isinstance(item, Job) else f"! {item.message}" for item in found]


def openai(**body: Any) -> dict[str, Any]:
    body.setdefault("messages", [{"role": "user", "content": "Hi"}])
    return {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **body}}
