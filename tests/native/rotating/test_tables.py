from __future__ import annotations

from collections.abc import Iterator

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.rotating.devices import DeviceGraph, Devices, nodes_of
from abcli.native.rotating.tables import NODES_PER_ROTATION, Layout, Rotation, Tables
from abcli.rope.frequencies import RopeParameters, angular_frequencies

BASE, OTHER = 10_000.0, 17_000.0
ROWS = 8


@pytest.fixture(scope="module")
def devices() -> Iterator[Devices]:
    with Devices() as opened:
        yield opened


# Operations that compute nothing.
VIEWS = {b"VIEW", b"RESHAPE", b"NONE"}


def turned_by_ggml(
    devices: Devices, rotation: Rotation, rows: np.ndarray, bases: list[float], positions: list[int], few: bool
) -> tuple[np.ndarray, list[bytes]]:
    """`rows` [rows, heads, width] after a graph on the CPU, and its operations; with `few` as where few are wanted."""
    device = devices.cpu
    device.prefers_few_operations = few
    buffer = device.memory(rows.nbytes)
    shape = (rotation.width, rows.shape[1], len(rows))
    source = device.tensor(llama.GGML_TYPE_F32, shape, buffer)
    api.tensor_set(source, rows.ctypes.data, 0, rows.nbytes)
    tables = Tables(devices, BASE, ROWS)
    tables.fill(Layout(tuple(bases), 1, 1), np.array(positions, np.int32))
    results = []

    def build(context: int) -> list[int]:
        results.append(tables.turn(context, source, rotation, TensorStruct.from_address(source)))
        return results

    out = np.empty_like(rows)
    with DeviceGraph(device.backend, 16, build) as graph:
        graph.compute()
        api.tensor_get(results[0], out.ctypes.data, 0, out.nbytes)
        nodes = [(TensorStruct.from_address(node).op, node) for node in nodes_of(graph.handle)]
    assert len(nodes) <= NODES_PER_ROTATION
    return out, [name for name in (api.operation(*node) for node in nodes) if name not in VIEWS]


@settings(max_examples=60, deadline=None)
@given(
    neox=st.booleans(),
    few=st.booleans(),
    shape=st.sampled_from([(64, 64), (64, 32), (64, 16), (80, 32), (16, 12), (6, 2), (2, 2)]),
    heads=st.integers(1, 5),
    positions=st.lists(st.integers(0, 200_000), min_size=1, max_size=ROWS),
    seed=st.integers(0, 99),
)
def test_rows_come_out_turned_by_the_difference(
    devices: Devices, neox: bool, few: bool, shape: tuple[int, int], heads: int, positions: list[int], seed: int
) -> None:
    width, dimensions = shape
    random = np.random.default_rng(seed)
    rows = random.standard_normal((len(positions), heads, width)).astype(np.float32)
    bases = [float(random.choice([BASE, OTHER, 5e5])) for _ in positions]
    parameters = RopeParameters(dimensions, neox)
    found, operations = turned_by_ggml(devices, Rotation(parameters, width), rows, bases, positions, few)
    assert operations == ([b"ROPE"] if few and not neox else [b"ROPE", b"MUL", b"ADD"])
    wanted = rows.astype(np.float64)
    first, second = (
        (range(dimensions // 2), range(dimensions // 2, dimensions))
        if neox
        else (range(0, dimensions, 2), range(1, dimensions, 2))
    )
    for row, (base, position) in enumerate(zip(bases, positions, strict=True)):
        angles = position * (angular_frequencies(parameters, base) - angular_frequencies(parameters, BASE))
        pairs = (wanted[row][:, first] + 1j * wanted[row][:, second]) * np.exp(1j * angles)
        wanted[row][:, first], wanted[row][:, second] = pairs.real, pairs.imag
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    native = [row for row, base in enumerate(bases) if base == BASE]
    np.testing.assert_array_equal(found[native], rows[native])
