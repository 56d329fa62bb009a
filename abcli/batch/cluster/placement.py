"""Which machine of a cluster gets how many workers, and what of the machine each of them gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abcli.errors import BatchError, UsageError


@dataclass(frozen=True)
class Node:
    """A machine, with the numbers of processors and GPUs that the cluster has of it."""

    identifier: str
    processors: int
    gpus: int = 0


@dataclass(frozen=True)
class Place:
    """Where a worker is to be, with its share of that machine."""

    node: Node
    processors: int
    gpus: float
    processes: int
    """How many workers share the machine."""


def place_workers(
    nodes: Sequence[Node], wanted: int | None = None, threads: int = 0, *, use_gpus: bool = True
) -> list[Place]:
    """A place for each of the `wanted` workers; None: one on every machine that has a processor.

    More workers than machines are spread by the machines' processors, and share these; with `threads` above 0 none
    claims more. Raises UsageError for more workers than processors and BatchError if there is no processor at all.
    """
    usable = [node for node in nodes if node.processors > 0]
    total = sum(node.processors for node in usable)
    if not usable:
        raise BatchError("no machine of the Ray cluster has a processor for a worker", "see `ray status`")
    if wanted is not None and wanted > total:
        raise UsageError(f"`ray_workers` {wanted} is more than the cluster has processors", f"choose {total} or fewer")
    counts = [0] * len(usable)
    order = []
    for _ in range(len(usable) if wanted is None else wanted):
        index = max(range(len(usable)), key=lambda at: (counts[at] == 0, usable[at].processors / (counts[at] + 1), -at))
        counts[index] += 1
        order.append(index)
    return [_place(usable[index], counts[index], threads, use_gpus) for index in order]


def _place(node: Node, processes: int, threads: int, use_gpus: bool) -> Place:
    share = node.processors // processes
    gpus = node.gpus // processes if node.gpus >= processes else node.gpus / processes
    return Place(node, min(share, threads) if threads else share, gpus if use_gpus else 0, processes)
