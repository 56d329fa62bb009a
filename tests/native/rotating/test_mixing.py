"""Merging where the logits lie, against the merge of numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.merge import Merger
from abcli.native import ggml_api as api
from abcli.native.rotating.devices import Devices
from abcli.native.rotating.mixing import LogitsMixer

SHAPES = [(6, 320, 1), (2, 1000, 3), (3, 4099, 2), (16, 49152, 1)]


@pytest.fixture
def devices() -> Iterator[Devices]:
    with Devices() as found:
        yield found


def on_device(devices: Devices, logits: NDArray[np.float32], stack: ExitStack) -> int:
    """A tensor f32 [vocabulary, rows] with the numbers of `logits` [slots, buckets, vocabulary]."""
    rows, vocabulary = logits.shape[0] * logits.shape[1], logits.shape[2]
    buffer = devices.cpu.memory(logits.nbytes, stack)
    tensor = devices.cpu.tensor(llama.GGML_TYPE_F32, (vocabulary, rows), buffer, stack=stack)
    api.tensor_set(tensor, logits.ctypes.data, 0, logits.nbytes)
    return tensor


def mixed(
    devices: Devices, logits: NDArray[np.float32], rule: MergeRule
) -> tuple[list[float] | None, NDArray[np.float32]]:
    slots, buckets, vocabulary = logits.shape
    rows = np.zeros((slots, vocabulary), np.float32)
    with ExitStack() as stack, LogitsMixer(devices, buckets, vocabulary) as mixer:
        mixer.mixes_on_cpu = True
        agreements = mixer.mix(on_device(devices, logits, stack), rule, list(rows))
        if agreements is not None:
            # The graph is kept, and gives the same again.
            again = np.zeros_like(rows)
            assert mixer.mix(on_device(devices, logits, stack), rule, list(again)) == agreements
            assert np.array_equal(rows, again)
    return agreements, rows


@pytest.mark.parametrize("rule", ["confidence", "mean"])
@pytest.mark.parametrize(("buckets", "vocabulary", "slots"), SHAPES)
def test_it_gives_what_the_merger_gives(
    devices: Devices, rule: MergeRule, buckets: int, vocabulary: int, slots: int
) -> None:
    random = np.random.default_rng(buckets)
    logits = random.normal(3, 4, (slots, buckets, vocabulary)).astype(np.float32)
    logits[:, :, 5] = -np.inf
    agreements, rows = mixed(devices, logits, rule)
    assert agreements is not None
    merger = Merger(buckets, vocabulary)
    for slot in range(slots):
        wanted = merger.merge(logits[slot], rule)
        assert agreements[slot] == pytest.approx(wanted.agreement, abs=2e-5)
        possible = wanted.logits > -np.inf
        assert np.array_equal(rows[slot] > -np.inf, possible)
        assert np.abs(rows[slot][possible] - wanted.logits[possible]).max() < 2e-5


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_left_to_the_merger(devices: Devices, wrong: float) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 3, 500)).astype(np.float32)
    logits[0, 1, 7] = wrong
    assert mixed(devices, logits, "confidence")[0] is None


def test_a_bucket_without_any_token_is_left_to_the_merger(devices: Devices) -> None:
    logits = np.zeros((1, 2, 500), np.float32)
    logits[0, 1] = -np.inf
    assert mixed(devices, logits, "mean")[0] is None


def test_other_rules_and_host_memory_are_left_to_the_merger(devices: Devices) -> None:
    logits = np.zeros((1, 2, 500), np.float32)
    assert mixed(devices, logits, "product")[0] is None
    with ExitStack() as stack, LogitsMixer(devices, 2, 500) as mixer:
        assert mixer.mix(on_device(devices, logits, stack), "mean", [np.zeros(500, np.float32)]) is None
        assert mixer.mix(0, "mean", [np.zeros(500, np.float32)]) is None
