"""`abcli inspect`: text, JSON, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import time
from pathlib import Path

import pytest

from abcli.engine import memory
from abcli.gguf.header import read_header
from tests.cli.conftest import Command
from tests.support.tiny_gguf import write_tiny_model


def test_json_tells_the_model_and_the_cost(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("inspect", tiny_model, "--json", "--buckets", 3, "-c", 1000, "-ctk", "q8_0")
    assert (outcome.code, outcome.errors) == (0, b"")
    found = json.loads(outcome.output)
    assert (found["architecture"], found["layers"], found["path"]) == ("llama", 2, str(tiny_model))
    assert found["parts"] == [{"path": str(tiny_model), "size_bytes": tiny_model.stat().st_size, "tensors": 21}]
    cost = found["memory"]
    # Two layers of 2 heads of 16 numbers: a block of q8_0 (34 bytes) and 32 numbers of f16.
    assert cost["kv_bytes_per_token"] == 2 * (34 + 64)
    assert cost["contexts"] == 3
    assert cost["parts"]["caches"] == 3 * 1024 * cost["kv_bytes_per_token"]
    assert cost["total"] == sum(cost["parts"].values())
    assert cost["fits"]
    assert cost["advice"] is None


def test_text_shows_what_is_asked_about(tiny_model: Path, abcli: Command) -> None:
    text = abcli("inspect", tiny_model, "-c", 0).text
    for words in ("neighbouring pairs (NORM)", "context of 4,096 tokens", "keys and values", "in all", "f32"):
        assert words in text
    assert "does not fit" not in text


@pytest.mark.parametrize(
    ("template", "text", "report"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<\x1b[2Jcall>"
            '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}'
            "{% endfor %}{% if enable_thinking is false %}<think></think>{% endif %}",
            "JSON after <",
            {"fallback": False, "several": True, "thoughts": {"begin": "<think>", "end": "</think>"}},
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "JSON in <tool_call> tags, the template having none",
            {"fallback": True},
        ),
        ("{{ broken", None, None),
    ],
)
def test_the_format_of_calls(
    template: str, text: str | None, report: dict[str, object] | None, tmp_path: Path, abcli: Command
) -> None:
    path = write_tiny_model(tmp_path / "a.gguf", chat_template=template)
    found = json.loads(abcli("inspect", path, "--json").output)["tool_calls"]
    assert (found is None) == (report is None)
    assert (report or {}).items() <= (found or {}).items()
    shown = abcli("inspect", path).text
    assert "\x1b" not in shown
    assert ("tool calls" in shown) == (text is not None)
    assert (text or "") in shown


def test_a_set_up_that_does_not_fit_says_what_would(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 12 * 2**20)
    found = json.loads(abcli("inspect", tiny_model, "--json", "-ngl", 0, "-c", 100_000).output)["memory"]
    assert not found["fits"]
    assert "--force" in found["advice"]
    assert "does not fit" in abcli("inspect", tiny_model, "-ngl", 0, "-c", 100_000).text


@pytest.mark.parametrize(
    "flags", [("--buckets", 0), ("--buckets", 17), ("-c", -1), ("--slots", 0), ("-ub", 0), ("-ngl", -2), ("-c", 2**31)]
)
def test_impossible_numbers(tiny_model: Path, abcli: Command, flags: tuple[str, int]) -> None:
    outcome = abcli("inspect", tiny_model, *flags)
    assert outcome.code == 2
    assert "impossible" in outcome.problem()[0]


def test_a_file_that_is_no_model(tmp_path: Path, abcli: Command) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    outcome = abcli("inspect", path)
    assert outcome.code == 1
    assert str(path) in outcome.problem()[0]


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path: Path, abcli: Command) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"general.name": "a\x1b[31m\nmodel"})
    text = abcli("inspect", path).text
    assert "\x1b" not in text
    assert "a[31m model" in text


def test_the_text_says_which_layers_have_a_window_and_which_tensors_which_type(tmp_path: Path, abcli: Command) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", architecture="gemma3", layers=7, dtype="q8_0")
    text = abcli("inspect", path).text
    assert "6 of 7 layers (0-4, 6) see the last 64 tokens" in text
    assert "base 10000 in layers with a window" in text
    assert re.search(r"^attn_k\.weight .* 7 q8_0$", text, re.MULTILINE)


def test_a_huge_model_is_inspected_in_about_a_second(tmp_path: Path, abcli: Command) -> None:
    """A vocabulary of 262,144 tokens, 4,000 tensors and, in a sparse file, 70 GB."""
    tokens = [b"token %06d" % number for number in range(262_144)]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "llama.vocab_size": len(tokens),
    }
    small = write_tiny_model(tmp_path / "m.gguf", vocabulary_size=320, metadata=metadata)
    data, header = small.read_bytes(), read_header(small)
    listing = data.index(struct.pack("<Q", len(header.tensors[0].name)) + header.tensors[0].name.encode())
    entries, offset = b"", 0
    shapes = {"token_embd.weight": (64, len(tokens))}
    names = [tensor.name for tensor in header.tensors]
    for name, shape in [(tensor.name, shapes.get(tensor.name, tensor.shape)) for tensor in header.tensors] + [
        (f"extra.{number}.weight", (4096, 1088)) for number in range(4000 - len(names))
    ]:
        entries += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        entries += struct.pack(f"<{len(shape)}QIQ", *shape, 0, offset)
        offset += -(-math.prod(shape) * 4 // 32) * 32
    head = data[:8] + struct.pack("<Q", 4000) + data[16:listing] + entries
    small.write_bytes(head)
    os.truncate(small, -(-len(head) // 32) * 32 + offset)
    assert small.stat().st_size > 70e9
    begin = time.process_time()
    outcome = abcli("inspect", small, "--json")
    # The promise is one second on an idle machine; the rest is for a busy one.
    assert time.process_time() - begin < 2.0
    assert outcome.code == 0
    assert json.loads(outcome.text)["tokenizer"]["tokens"] == 262_144
