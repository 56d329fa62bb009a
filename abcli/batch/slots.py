"""How many prompts are decoded together, and what they need in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from abcli.engine.memory import Room, free_room, predict
from abcli.errors import OutOfMemoryError, UsageError
from abcli.llm import LLM
from abcli.prepare import Prepared
from abcli.reuse import ReuseRule
from abcli.text import counted, gibibytes

# llama.cpp's sequences: one for each slot, and a spare one.
MOST_SLOTS = 255
# From about so many rows (slots x buckets) on, a token takes hardly less time in a larger batch (docs/batch.md) ...
ENOUGH_ROWS = 96
# ... and each slot takes memory, so that few buckets don't get as many slots as that.
MOST_AUTOMATIC = 32
LEAST_AUTOMATIC = 8
# What they take, others on the same machine cannot.
_SHARE = 4


@dataclass(frozen=True)
class SlotPlan:
    """A number of slots, the memory that the whole set-up is predicted to take, and what is free, in bytes."""

    slots: int
    needed: Room
    free: Room

    def text(self, context_size: int, buckets: int) -> str:
        """The plan in one line, e.g. "16 slots of 4,096 tokens for 6 buckets: about 4.3 GiB of 15 GiB free"."""
        slots = counted(self.slots, "slot")
        kind = counted(buckets, "bucket")
        memory = f"about {gibibytes(self.needed.host)} of {gibibytes(self.free.host)} free"
        if self.needed.device:
            memory += f", {gibibytes(self.needed.device)} of {gibibytes(self.free.device)} on the device"
        return f"{slots} of {context_size:,} tokens for {kind}: {memory}"


def plan_slots(wanted: int | None, found: Prepared, prompts: int | None = None, processes: int = 1) -> SlotPlan:
    """As many slots as `wanted`; None: as many as are of use for so many buckets and `prompts`, if that is known.

    Those beyond the first take at most a quarter of the memory that the first leaves; so many `processes` share what
    is free. Raises UsageError for an impossible number and
    OutOfMemoryError for one that does not fit, unless `force`.
    """
    config, bases = found.context, found.buckets.bases
    free = free_room(found.model.config.gpu_layers)
    free = Room(free.host // processes, free.device // processes)
    if wanted is None:
        useful = min(MOST_AUTOMATIC, max(LEAST_AUTOMATIC, ENOUGH_ROWS // len(bases)))
        if prompts is not None:
            useful = min(useful, max(1, prompts))
        one = _needed(1, found)
        room = Room(one.host + (free.host - one.host) // _SHARE, one.device + (free.device - one.device) // _SHARE)
        return _plan(max(1, _most(useful, found, room)), found, free)
    if not 1 <= wanted <= MOST_SLOTS:
        raise UsageError(f"`slots` {wanted} is impossible", f"choose 1 to {MOST_SLOTS}, or auto")
    plan = _plan(wanted, found, free)
    if not config.force and not _fits(plan.needed, free):
        fitting = _most(wanted, found, free)
        raise OutOfMemoryError(
            plan.text(config.context_size, len(bases)) + " is more than there is",
            f"`slots={fitting}` would fit; or take a shorter `ctx_size` or fewer buckets"
            if fitting
            else "take a shorter `ctx_size` or fewer buckets",
        )
    return plan


def _plan(slots: int, found: Prepared, free: Room) -> SlotPlan:
    return SlotPlan(slots, _needed(slots, found), free)


def _needed(slots: int, found: Prepared) -> Room:
    needed = predict(found.model, replace(found.context, slots=slots), found.buckets)
    return Room(needed.host, needed.device)


def _most(limit: int, found: Prepared, room: Room) -> int:
    """The most slots up to `limit` that fit into `room`; 0 if not one does."""
    return next((slots for slots in range(limit, 0, -1) if _fits(_needed(slots, found), room)), 0)


def _fits(needed: Room, room: Room) -> bool:
    return needed.host <= room.host and needed.device <= room.device


def reuse_rule(llm: LLM) -> ReuseRule:
    """How much prompts may take over from one another in the slots of `llm`."""
    return ReuseRule(llm.engine.least_shared)
