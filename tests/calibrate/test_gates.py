"""What gates change, on answers whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from abcli.calibrate.gates import GATES, GateTrial, first_base, lowest_gate, steps_of, try_gate
from abcli.evals.configurations import Configuration
from abcli.evals.statistics import paired_difference
from abcli.evals.traces import Node, Trace
from scripts.gate_thresholds import margin

NATIVE, OTHER = 1e4, 2e4
BOTH = Configuration("both", (NATIVE, OTHER))


def node(*probabilities: float) -> Node:
    """The native bucket gives these to tokens 0 and 1; the other one is sure of token 1."""
    rows = np.log(np.array([probabilities, (0.001, 0.999)], np.float32))
    return Node(np.array([0, 1], np.int32), rows, -(np.exp(rows) * rows).sum(axis=1))


# Two answers of two tokens; token 1 is right. The first is sure and wrong, then neither.
TRACES = [
    Trace((NATIVE, OTHER), (node(0.95, 0.05), node(0.5, 0.5)), (((0, 1), (1, 1)),)),
    Trace((NATIVE, OTHER), (node(0.1, 0.9), node(0.2, 0.8)), (((0, 1), (1, 1)),)),
]
GROUPS = np.array([0, 1])


def test_where_the_native_bucket_is_sure_its_loss_counts() -> None:
    steps = steps_of(TRACES, BOTH, NATIVE)
    assert steps.question.tolist() == [0, 0, 1, 1]
    assert steps.sure == pytest.approx([0.95, 0.5, 0.9, 0.8], abs=1e-6)
    assert steps_of(TRACES, BOTH, NATIVE, margin).sure == pytest.approx([0.9, 0.0, 0.8, 0.6], abs=1e-6)
    assert try_gate(steps, GROUPS, 1.0) == GateTrial(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    gated = try_gate(steps, GROUPS, 0.92)
    loss, merged = steps.losses[0]
    assert gated.asked == 0.75
    assert gated.difference == pytest.approx((loss - merged) / 4)
    assert loss == pytest.approx(-np.log(0.05), abs=1e-5)
    # Only asking the other bucket makes the first answer right.
    assert (gated.exact, gated.exact_error) == paired_difference(np.array([0.0, 1.0]), np.ones(2), GROUPS)
    assert try_gate(steps, GROUPS, -1.0).asked == 0


def test_the_base_that_goes_first_is_nearest_to_the_models_own() -> None:
    others = replace(BOTH, bases=(OTHER, 3e4))
    assert first_base(BOTH, NATIVE) == NATIVE
    assert first_base(others, NATIVE) == NATIVE
    assert first_base(replace(others, prefill="exact"), NATIVE) == OTHER


def test_the_lowest_gate_that_costs_nothing() -> None:
    harmless = GateTrial(0.5, 0.2, 0.002, 0.001, 0.0, 0.0)
    harmful = replace(harmless, difference=0.004)
    assert harmless.harmless
    assert not harmful.harmless
    # What is better than asking always costs nothing.
    assert replace(harmless, difference=-0.1, error=0.05).harmless

    def trials(*found: GateTrial) -> list[GateTrial]:
        return [replace(trial, gate=gate) for trial, gate in zip(found, GATES, strict=False)]

    assert lowest_gate(trials(harmless, harmless)) == 0.5
    assert lowest_gate(trials(harmful, harmless, harmless)) == 0.6
    # One that looks harmless below one that is not may be luck.
    assert lowest_gate(trials(harmless, harmful, harmless)) == 0.7
    assert lowest_gate(trials(harmless, harmful)) == 1.0
