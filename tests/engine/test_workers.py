from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.engine.workers import WorkerPlan, available_cores, plan_workers


@pytest.mark.parametrize(
    ("buckets", "cores", "expected"),
    [
        (1, 2, WorkerPlan(1, 2)),
        (1, 8, WorkerPlan(1, 8)),
        (6, 1, WorkerPlan(1, 1)),
        (6, 2, WorkerPlan(2, 1)),
        (6, 4, WorkerPlan(2, 2)),
        (6, 8, WorkerPlan(6, 1)),
        (2, 8, WorkerPlan(2, 4)),
    ],
)
def test_plans(buckets: int, cores: int, expected: WorkerPlan) -> None:
    assert plan_workers(buckets, cores) == expected


@given(st.integers(1, 16), st.integers(1, 128))
def test_a_plan_never_takes_more_cores_or_workers_than_there_are(buckets: int, cores: int) -> None:
    plan = plan_workers(buckets, cores)
    assert 1 <= plan.workers <= buckets
    assert plan.threads >= 1
    assert plan.workers * plan.threads <= cores
    assert ceil(buckets / plan.workers) >= 1


def test_there_is_at_least_one_core() -> None:
    assert available_cores() >= 1
