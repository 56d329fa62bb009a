from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.config import ContextConfig
from abcli.errors import NativeError, UnsupportedModelError
from abcli.native import ggml_api as api
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.rotating import context as context_module
from abcli.native.rotating import following
from abcli.native.rotating.context import FusedContext, SlotPart
from abcli.native.rotating.devices import Device, nodes_of
from abcli.native.rotating.hook import compute_hook, rope_hook
from abcli.native.rotating.tables import Tables
from abcli.native.rotating.turning import InGraph
from abcli.native.state import StateError, parse_state
from tests.support.models import open_model
from tests.support.tiny_gguf import write_tiny_model

BASES = (5_000.0, 10_000.0, 20_000.0)
TOKENS = [index * 7 % 250 for index in range(60)]


def config(**changes: Any) -> ContextConfig:
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
    return ContextConfig(**{"context_size": 256, "threads": 2, **exact, **changes})


def fused(model: Model, **changes: Any) -> FusedContext:
    return FusedContext(model, BASES, config(**changes), 10_000.0, 2, CancelFlag())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("models") / "gemma.gguf"
    with open_model(write_tiny_model(path, architecture="gemma3", layers=7, rope_base=10_000.0)) as model:
        yield model


def logits_of(context: FusedContext, tokens: list[int], **settings: Any) -> np.ndarray:
    for column in range(3):
        context.truncate(context.sequence(0, column), 0)
    out = np.empty((1, 3, 320), np.float32)
    context.compute([SlotPart(0, 0, tokens)], range(3), out, **settings)
    return out[0]


def test_the_layout_of_ggmls_tensors_is_the_one_known() -> None:
    api.check_tensor_layout()


def test_another_layout_of_tensors_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(api.TensorStruct._fields_)
    fields[2], fields[3] = fields[3], fields[2]

    class Swapped(ctypes.Structure):
        _fields_ = tuple(fields)

    monkeypatch.setattr(api, "TensorStruct", Swapped)
    api.check_tensor_layout.cache_clear()
    try:
        with pytest.raises(NativeError, match="lays out tensors"):
            api.check_tensor_layout()
    finally:
        api.check_tensor_layout.cache_clear()


def test_all_rotations_of_a_plain_model_follow_the_base(model: Model) -> None:
    with fused(model) as context:
        assert [rope.base for rope in context.observation.ropes] == [10_000.0] * 4
        assert context.follows == {0, 1, 2, 3}
        assert {keys.rope for keys in context.observation.keys.values()} <= {0, 1, 2, 3}


def test_layers_with_a_base_of_their_own_are_told_apart_even_if_it_is_the_same(gemma: Model) -> None:
    with fused(gemma) as context:
        # Six of seven layers see a window and keep base 10,000, which the context has too.
        assert {rope.base for rope in context.observation.ropes} == {10_000.0}
        assert context.follows == {10, 11}
        assert context.turning_layers == 1


def test_values_are_known_to_lie_in_columns_without_flash_attention(model: Model) -> None:
    for attention, transposed in (("on", False), ("off", True)):
        with fused(model, flash_attention=attention) as context:
            assert {values.transposed for values in context.observation.values.values()} == {transposed}


def test_state_bytes_are_read_and_written_in_pieces(gemma: Model) -> None:
    for attention in ("on", "off"):
        with fused(gemma, flash_attention=attention) as context:
            first = logits_of(context, TOKENS).copy()
            pieces = [context.read_cells(0, 0, start, start + 20) for start in (0, 20)]
            (cache,) = parse_state(pieces[1])
            assert list(cache.positions) == list(range(20, 40))
            assert len(cache.layers) == 7
            for column in range(3):
                context.truncate(context.sequence(0, column), 0)
            for start, data in zip((0, 20), pieces, strict=True):
                context.write_cells(0, 0, start, TOKENS[start : start + 20], data)
            out = np.empty((1, 1, 320), np.float32)
            context.compute([SlotPart(0, 40, TOKENS[40:])], [0], out, careful=True)
            np.testing.assert_allclose(out[0, 0], first[0], atol=1e-4)


def test_foreign_state_bytes_are_refused(model: Model) -> None:
    with fused(model) as context:
        logits_of(context, TOKENS)
        data = context.read_cells(0, 0, 0, 20)
        broken = [data[:-1], np.append(data, np.uint8(0)), data[:100], data[:0]]
        for index in (0, 8, 12, 16, 260, 266):
            broken.append(data.copy())
            broken[-1][index] ^= 0xFF
        for each in broken:
            context.truncate(context.sequence(0, 1), 0)
            with pytest.raises(StateError):
                context.write_cells(0, 1, 0, TOKENS[:20], each)


def test_a_key_elsewhere_than_at_its_position_is_noticed(model: Model) -> None:
    with fused(model) as context:
        out = np.empty((1, 3, 320), np.float32)
        # The first token of an empty sequence gets the first cell, whatever its position.
        context.compute([SlotPart(0, 7, [1])], range(3), out)
        context.truncate(context.sequence(0, 0), 0)
        for column in (1, 2):
            context.truncate(context.sequence(0, column), 0)
        with pytest.raises(NativeError, match="elsewhere than at its position"):
            context.compute([SlotPart(0, 7, [1])], range(3), out, careful=True)
        for column in range(3):
            context.truncate(context.sequence(0, column), 0)
        assert np.isfinite(logits_of(context, TOKENS, careful=True)).all()


def test_reserved_cells_cost_no_computation(model: Model) -> None:
    with fused(model) as context:
        context.reserve(0, [1], 0, TOKENS)
        assert context.length(context.sequence(0, 1)) == len(TOKENS)
        assert context.length(context.sequence(0, 0)) == 0


@pytest.mark.parametrize("obstacle", ["", "for the test"], ids=["in the graph", "by callback"])
@pytest.mark.parametrize(
    ("raised", "wanted"),
    [(ValueError("x"), NativeError), (NativeError("x"), NativeError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_what_is_raised_while_llama_cpp_works_comes_out_as_it_should(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    obstacle: str,
    raised: BaseException,
    wanted: type[BaseException],
) -> None:
    monkeypatch.setattr(context_module, "hook_obstacle", lambda: obstacle)
    with fused(model) as context:
        first = logits_of(context, TOKENS).copy()

        def failing(*_arguments: object) -> int:
            raise raised

        with monkeypatch.context() as patch:
            patch.setattr(Tables, "turn", failing)
            # Another number of rows, so that llama.cpp builds a graph anew.
            with pytest.raises(wanted):
                logits_of(context, TOKENS[:7])
        np.testing.assert_array_equal(logits_of(context, TOKENS), first)


def test_a_graph_that_does_not_turn_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with fused(model) as context:
        logits_of(context, TOKENS)
        rope_hook().release()
        try:
            with pytest.raises(NativeError, match="turns 180 rows where 21 were"):
                logits_of(context, TOKENS[:7])
        finally:
            rope_hook().acquire()


def test_a_wrong_turn_inside_the_graph_falls_back_to_the_callback(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fused(model) as context:
        assert context.turning_note == "rows are turned inside llama.cpp's graph"
        right = logits_of(context, TOKENS).copy()
    turned = InGraph._turned
    monkeypatch.setattr(InGraph, "_turned", lambda self, *_: turned(self, *_) and _[1])
    with fused(model) as context:
        assert "by callback: the keys of layer 0 came out wrong" in context.turning_note
        np.testing.assert_allclose(logits_of(context, TOKENS), right, atol=1e-4)


def test_a_graph_without_room_falls_back_to_the_callback(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "NODES_PER_ROTATION", 10_000)
    with fused(model) as context:
        assert "by callback: llama.cpp's graph has room for" in context.turning_note
    assert not rope_hook().installed


def test_one_base_is_plain_llama_cpp(model: Model) -> None:
    with FusedContext(model, BASES[1:2], config(), 10_000.0, 2, CancelFlag()) as context:
        assert context.turning_note == ""
        assert not rope_hook().installed


@pytest.mark.parametrize("attention", ["on", "off"])
def test_rows_of_the_native_base_are_bit_for_bit_those_of_plain_llama_cpp(model: Model, attention: str) -> None:
    settings = config(flash_attention=attention)
    found = []
    for bases in (BASES, (10_000.0,) * 3):
        with FusedContext(model, bases, settings, 10_000.0, 2, CancelFlag()) as context:
            found.append(logits_of(context, TOKENS)[1].copy())
    np.testing.assert_array_equal(*found)


def continued(context: FusedContext, monkeypatch: pytest.MonkeyPatch) -> tuple[list[np.ndarray], list[list[bytes]]]:
    """Logits [buckets, vocab] after many rows, few, and many again; and the operations of the graph each time."""
    graphs = []

    def compute(_self: InGraph, original: Any, scheduler: int, graph: int) -> int:
        nodes = [(api.TensorStruct.from_address(node).op, node) for node in nodes_of(graph)]
        graphs.append([api.operation(*node) for node in nodes])
        return int(original(scheduler, graph))

    found = []
    with monkeypatch.context() as patch:
        patch.setattr(InGraph, "compute", compute)
        for start, end in ((0, 40), (40, 42), (42, 43), (43, 60)):
            out = np.empty((1, 3, 320), np.float32)
            context.compute([SlotPart(0, start, TOKENS[start:end])], range(3), out)
            found.append(out[0])
    return found, graphs


def test_where_operations_are_dear_a_rotation_turns_few_rows_by_one_more(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fused(model) as context:
        wanted, _ = continued(context, monkeypatch)
    with FusedContext(model, (10_000.0,) * 3, config(), 10_000.0, 2, CancelFlag()) as context, compute_hook().held():
        native, plain = continued(context, monkeypatch)
    monkeypatch.setattr(Device, "prefers_few_operations", True)
    with fused(model) as context:
        found, graphs = continued(context, monkeypatch)
    for right, own, other in zip(wanted, native, found, strict=True):
        np.testing.assert_allclose(other, right, atol=1e-5)
        np.testing.assert_array_equal(other[1], own[1])
    views = {b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE", b"NONE"}
    extra = [
        len([name for name in graph if name not in views]) - len([name for name in other if name not in views])
        for graph, other in zip(graphs, plain, strict=True)
    ]
    # There are two rotations in each of two layers; 40 and 17 tokens of three buckets are 120 and 51 rows.
    assert extra == [4 * 3, 4, 4, 4]


def test_the_sequences_of_neighbouring_slots_have_no_gaps(model: Model) -> None:
    with FusedContext(model, BASES, config(slots=3), 10_000.0, 2, CancelFlag(), leader=9_000.0) as context:
        assert [context.sequence(slot, column) for slot in range(3) for column in range(3)] == list(range(9))
        assert [context.sequence(slot, 3) for slot in range(3)] == [9, 10, 11]


def test_a_model_without_rotations_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "gpt2.gguf", architecture="gpt2")
    with open_model(path) as model, pytest.raises(UnsupportedModelError, match="no rotation"):
        fused(model)
