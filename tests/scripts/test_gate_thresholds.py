"""scripts/gate_thresholds.py: what is asked, and what that costs, on answers whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest

from abcli.evals.traces import Node, Trace
from scripts.gate_thresholds import MEASURES, judge, steps

NATIVE, OTHER = 1e4, 2e4


def node(*probabilities: float) -> Node:
    """The native bucket gives these to tokens 0 and 1; the other one is sure of token 1."""
    rows = np.log(np.array([probabilities, (0.001, 0.999)], np.float32))
    return Node(np.array([0, 1], np.int32), rows, -(np.exp(rows) * rows).sum(axis=1))


def test_where_the_native_bucket_is_sure_its_loss_counts() -> None:
    # Two answers of two tokens; token 1 is right. The first is sure and wrong, then neither.
    traces = [
        Trace((NATIVE, OTHER), (node(0.95, 0.05), node(0.5, 0.5)), (((0, 1), (1, 1)),)),
        Trace((NATIVE, OTHER), (node(0.1, 0.9), node(0.2, 0.8)), (((0, 1), (1, 1)),)),
    ]
    found = list(steps(traces, (NATIVE, OTHER), NATIVE))
    assert [step.question for step in found] == [0, 0, 1, 1]
    assert [step.sure["probability"] for step in found] == pytest.approx([0.95, 0.5, 0.9, 0.8], abs=1e-6)
    assert [step.sure["margin"] for step in found] == pytest.approx([0.9, 0.0, 0.8, 0.6], abs=1e-6)
    assert found[1].sure["exp(-entropy)"] == pytest.approx(0.5, abs=1e-6)
    assert set(found[0].sure) == set(MEASURES)
    groups = np.array([0, 1])
    always = judge(found, groups, np.ones(4, bool))
    assert (always["asked"], always["nll"], always["exact_difference"]) == (1.0, [0.0, 0.0], [0.0, 0.0])
    sure = np.array([step.sure["probability"] for step in found])
    gated = judge(found, groups, sure <= 0.92)
    loss, merged = found[0].losses
    assert gated["asked"] == 0.75
    assert gated["nll"][0] == pytest.approx((loss - merged) / 4)  # type: ignore[index]
    assert loss == pytest.approx(-np.log(0.05), abs=1e-5)
    # Only asking the other bucket makes the first answer right.
    assert (always["exact"], gated["exact"]) == (1.0, 0.5)
