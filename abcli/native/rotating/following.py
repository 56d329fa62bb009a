"""Which rotations of a model follow the RoPE base, and whether its graph has room for turning them on."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from abcli.config import ContextConfig
from abcli.errors import UnsupportedModelError
from abcli.native.context import BatchPart, Sequences, context_parameters
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.rotating.callback import ByCallback
from abcli.native.rotating.devices import Devices
from abcli.native.rotating.graph import Observation, Observer
from abcli.native.rotating.hook import rope_hook
from abcli.native.rotating.tables import NODES_PER_ROTATION
from abcli.native.rotating.turning import InGraph, Turning, marked_base

# The smallest number of cells that llama.cpp makes.
_CELLS = 256
# Graphs of several tokens may take a few nodes more than that of one.
_SPARE_NODES = 64


def following_rotations(
    model: Model, config: ContextConfig, base: float, cancel: CancelFlag, obstacle: str
) -> tuple[frozenset[int], Observation | None, str]:
    """Which ROPE operations of the model follow the base, and why they cannot be turned inside the graph.

    Where heads have bases of their own, the graph without these is between both. `obstacle` is what is known already.
    Some layers keep a base of their own. Raises UnsupportedModelError if no operation follows the base, or one is of
    another kind than plain RoPE.
    """
    tiny = replace(config, batch_size=1, ubatch_size=1)
    marked = marked_base(base)
    parameters = context_parameters(model, marked, tiny, 1, cancel)
    parameters.n_ctx = _CELLS
    parameters.n_seq_max = parameters.n_outputs_max = 1
    observer = Observer()
    with ExitStack() as stack:
        way: Turning = ByCallback(base, None, Devices()) if obstacle else InGraph(base, None)
        made: list[Sequences] = []
        way.make(
            parameters, lambda: made.append(stack.enter_context(Sequences(model, parameters, cancel, tuned=False)))
        )
        (other,) = made
        if not obstacle:
            stack.enter_context(rope_hook().held())
        part = BatchPart(0, 0, (model.vocabulary_size // 2,), output=False)
        way.run(lambda: other.decode([part]), visit=observer.visit)
        observation = observer.result()
    ropes = observation.ropes
    follows = frozenset(index for index, rope in enumerate(ropes) if rope.base == marked)
    if not follows:
        raise UnsupportedModelError("no rotation of the model follows the RoPE base", "use `buckets=1`")
    if any(ropes[index].first_dimension for index in follows):
        raise UnsupportedModelError(
            "the model rotates a part of each head only, from its middle on", "use `engine=contexts` with this model"
        )
    if isinstance(way, InGraph) and way.free_nodes < len(follows) * NODES_PER_ROTATION + _SPARE_NODES:
        obstacle = f"llama.cpp's graph has room for {way.free_nodes} more nodes only"
    return follows, observation if model.checked.tuning.multipliers else None, obstacle
