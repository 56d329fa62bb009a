"""How many prompts are decoded together, and what they need in memory."""

from __future__ import annotations

from dataclasses import dataclass

from abcli.batch.prefixes import ReuseRule
from abcli.config import EngineConfig
from abcli.engine.memory import available_memory
from abcli.engine.protocol import Engine
from abcli.engine.slots import MIN_SHARED_TOKENS
from abcli.errors import OutOfMemoryError, UsageError
from abcli.models.header import Header
from abcli.native.library import supports_offload

# More slots gain little where two to eight cores compute, and all their caches are read for every token.
MOST_AUTOMATIC = 8
MOST_SLOTS = 256
_MIB = 1 << 20
_FLOAT_BYTES = 4
# The engine's logits, llama.cpp's own and the copy that a step returns.
_LOGITS_COPIES = 3
# A sampler's candidates (id, logit, probability) and ids.
_SAMPLER_BYTES = 16


@dataclass(frozen=True)
class SlotPlan:
    """A number of slots, with bytes of memory: for one slot, for all of them, and what is free."""

    slots: int
    slot_bytes: int
    available: int
    on_device: bool
    """Whether the caches may lie in the memory of a GPU, of which nothing is known here."""

    def text(self, context_size: int, buckets: int) -> str:
        """The plan in one line, e.g. "8 slots of 4,096 tokens for 6 buckets take about 4,392 MiB of 15,000"."""
        slots = "1 slot" if self.slots == 1 else f"{self.slots} slots"
        kind = "1 bucket" if buckets == 1 else f"{buckets} buckets"
        free = "" if self.on_device else f" of {self.available // _MIB:,} free"
        needed = -(-self.slots * self.slot_bytes // _MIB)
        return f"{slots} of {context_size:,} tokens for {kind}: about {needed:,} MiB{free}"


def slot_bytes(config: EngineConfig, header: Header) -> int:
    """The bytes one more slot takes: the keys and values of its context in every bucket, and its logits.

    `config` has the bases and a context size above 0.
    """
    buckets = len(config.bases)
    contexts = buckets
    if config.prefill != "exact" and buckets > 1 and (config.prefill_base or header.native_base) not in config.bases:
        contexts += 1  # the one that prefills for the others
    cache = header.kv_bytes_per_token(config.cache_type_k, config.cache_type_v) * config.context_size * contexts
    logits = header.vocabulary_size * (_FLOAT_BYTES * _LOGITS_COPIES * contexts + _SAMPLER_BYTES)
    return cache + logits


def plan_slots(wanted: int | None, config: EngineConfig, header: Header, processes: int = 1) -> SlotPlan:
    """As many slots as `wanted`; None: as many as fit into half of the free memory, at most MOST_AUTOMATIC.

    `config` has the bases and a context size above 0; so many `processes` share the memory. Raises UsageError for
    an impossible number and OutOfMemoryError for one that does not fit.
    """
    each, available = slot_bytes(config, header), available_memory() // processes
    on_device = config.gpu_layers != 0 and supports_offload()
    if wanted is None:
        fitting = MOST_AUTOMATIC if on_device else available // 2 // each
        return SlotPlan(max(1, min(MOST_AUTOMATIC, fitting)), each, available, on_device)
    if not 1 <= wanted <= MOST_SLOTS:
        raise UsageError(f"--slots {wanted} is impossible", f"choose 1 to {MOST_SLOTS}, or auto")
    plan = SlotPlan(wanted, each, available, on_device)
    if not on_device and wanted * each > available:
        fitting = max(1, available // each)
        raise OutOfMemoryError(
            plan.text(config.context_size, len(config.bases)) + " is more than there is",
            f"--slots {fitting} would fit; or take a shorter --ctx-size or fewer buckets"
            if fitting < wanted
            else "take a shorter --ctx-size or fewer buckets",
        )
    return plan


def reuse_rule(config: EngineConfig, engine: Engine) -> ReuseRule:
    """How much prompts may take over from one another in `engine`, which was made with `config`."""
    if not engine.prefill_note.startswith("shared"):
        return ReuseRule()
    return ReuseRule(2 if config.prefill == "shared" else MIN_SHARED_TOKENS)
