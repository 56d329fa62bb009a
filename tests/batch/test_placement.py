"""Where the workers of a cluster go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.batch.cluster.placement import Node, Place, place_workers
from abcli.errors import BatchError, UsageError

BIG, SMALL, HEAD = Node("big", 16, 2), Node("small", 4), Node("head", 0)


def test_one_worker_on_every_machine_with_a_processor() -> None:
    assert place_workers([HEAD, BIG, SMALL]) == [Place(BIG, 16, 2, 1), Place(SMALL, 4, 0, 1)]


def test_more_workers_than_machines_share_them_by_their_processors() -> None:
    places = place_workers([SMALL, BIG], 5)
    assert [place.node for place in places].count(BIG) == 4
    assert {(place.node.identifier, place.processors, place.gpus) for place in places} == {
        ("big", 4, 0.5),
        ("small", 4, 0),
    }
    assert {place.processes for place in places} == {1, 4}


def test_fewer_workers_than_machines_take_the_largest() -> None:
    assert [place.node for place in place_workers([SMALL, BIG], 1)] == [BIG]


def test_threads_limit_what_is_claimed() -> None:
    assert [place.processors for place in place_workers([SMALL, BIG], threads=6)] == [6, 4]


def test_gpus_are_left_alone_without_gpu_layers() -> None:
    assert [place.gpus for place in place_workers([BIG], use_gpus=False)] == [0]


def test_a_cluster_without_processors_is_an_error() -> None:
    with pytest.raises(BatchError, match="no machine"):
        place_workers([HEAD])


def test_more_workers_than_processors_are_refused() -> None:
    with pytest.raises(UsageError, match="`ray_workers` 5") as caught:
        place_workers([SMALL, HEAD], 5)
    assert "4 or fewer" in caught.value.hint


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(0, 4),
)
def test_no_machine_gives_more_than_it_has(sizes: list[tuple[int, int]], wanted: int, threads: int) -> None:
    nodes = [Node(str(index), *size) for index, size in enumerate(sizes)]
    if wanted > sum(node.processors for node in nodes):
        with pytest.raises((UsageError, BatchError)):
            place_workers(nodes, wanted, threads)
        return
    places = place_workers(nodes, wanted, threads)
    assert len(places) == wanted
    for node in nodes:
        here = [place for place in places if place.node == node]
        assert all(place.processors >= 1 and place.processes == len(here) for place in here)
        assert sum(place.processors for place in here) <= node.processors
        assert sum(place.gpus for place in here) <= node.gpus + 1e-9
