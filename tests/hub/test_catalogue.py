"""The catalogue of known models is complete, and every entry can be used as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from abcli.errors import ModelFileError
from abcli.hub import catalogue
from abcli.hub.catalogue import catalogue_path, known_models
from abcli.hub.locate import resolve_name
from abcli.hub.names import choose_files, parse_hub_name, quant_of
from abcli.profiles.profile import from_values

ENTRIES: list[dict[str, Any]] = json.loads(catalogue_path().read_text(encoding="utf-8"))["models"]
LICENCES = {"Apache-2.0", "MIT", "LicenseRef-Llama-3.2", "LicenseRef-Gemma", "LicenseRef-Qwen-Research"}
FIELDS = {"name", "file", "size", "sha256", "licence", "context", "source", "profiles"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_an_entry_is_sound(entry: dict[str, Any]) -> None:
    assert entry.keys() == FIELDS
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", entry["name"])
    assert entry["licence"] in LICENCES
    assert type(entry["size"]) is int
    assert 50_000_000 < entry["size"] < 4_000_000_000
    assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
    assert entry["context"] in (8192, 32768, 131072)
    assert quant_of(entry["file"]) in {"Q4_1", "Q4_K_M", "Q8_0"}
    for values in entry["profiles"]:
        assert from_values(values, entry["name"]).model == entry["file"]
    known = known_models()[entry["name"]]
    if entry["source"]["kind"] == "hub":
        assert entry["source"].keys() == {"kind", "repository"}
        assert entry["source"]["repository"].endswith("-GGUF")
        assert known.hub is not None
        assert parse_hub_name(str(known.hub)) == known.hub == resolve_name(entry["name"])
        assert choose_files(known.hub, [entry["file"]]) == (entry["file"],)
    else:
        assert entry["source"]["kind"] == "wheel"


def test_names_are_unique_and_lead_to_different_files() -> None:
    assert len(known_models()) == len(ENTRIES)
    for field in ("file", "size", "sha256"):
        assert len({str(entry[field]).lower() for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("content", ["", "[]", '{"models": 3}', '{"models": [{}]}', '{"models": [3]}', "[" * 100_000])
def test_a_damaged_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = tmp_path / "catalogue.json"
    monkeypatch.setattr(catalogue, "catalogue_path", lambda: path)
    assert known_models() == {}
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ModelFileError) as caught:
        known_models()
    assert str(path) in caught.value.message
