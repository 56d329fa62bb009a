"""How much memory a set-up will take, from the model's header alone, and what to change where it does not fit.

Where the numbers come from, and how far to trust each of them, is in docs/memory.md. Where llama.cpp's choice is not
known beforehand, the larger one is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from abcli.config import CONTEXT_STEP, MAX_CONTEXT, Buckets, ContextConfig
from abcli.engine.engine import MIN_SHARED_TOKENS
from abcli.engine.memory_shape import MemoryShape
from abcli.engine.workers import available_cores, plan_workers
from abcli.errors import OutOfMemoryError
from abcli.gguf.checked import CheckedModel
from abcli.native.llama import Device, devices, supports_offload
from abcli.native.rotating.tables import MOST_DIVIDED_ROWS
from abcli.text import counted, gibibytes

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
# Memory that cgroups call unlimited, in version 1 a number near 2^63.
_UNLIMITED = 1 << 60
# Devices in llama.cpp's list that compute in the machine's own memory.
_HOST_DEVICES = ("CPU", "BLAS", "ACCEL")
_BLOCK_TYPES = {"q8_0", "q5_1", "q5_0", "q4_1", "q4_0"}
_BLOCK_ELEMENTS = 32
_FLOAT = 4
# What the logits of several tokens at once may take, in all buckets.
_OUTPUT_BYTES = 64 << 20
# What CUDA keeps on a device from the first computation on, and for each context (H100). Others were not measured.
_CUDA_BYTES = 70_000_000
_CUDA_CONTEXT_BYTES = 12_000_000
# What cuBLAS takes for each context: where attention is no flash attention, beside the scores as f16, and for weights
# that are not quantised.
_CUBLAS_BYTES = 85_000_000


@dataclass(frozen=True)
class Room:
    """Bytes that are free: in the machine's memory and, in sum, on the devices that layers are put on."""

    host: int
    device: int = 0


@dataclass(frozen=True)
class Item:
    """One part of what is needed, in bytes; `device` is what of it lies on devices.

    Of `host`, `idle` bytes are reserved but not touched while prompts are computed once for all buckets.
    """

    name: str
    host: int
    device: int
    idle: int = 0

    @property
    def total(self) -> int:
        """All bytes of this part."""
        return self.host + self.device


@dataclass(frozen=True)
class Setup:
    """What a prediction is for, apart from the model."""

    gpu_layers: int
    context: ContextConfig
    buckets: Buckets


@dataclass(frozen=True)
class Prediction:
    """What a set-up needs; `contexts` are llama.cpp's, each with `cells` tokens, in all its sequences."""

    setup: Setup
    shape: MemoryShape
    fused: bool
    contexts: int
    cells: int
    kv_bytes_per_token: int
    items: tuple[Item, ...]

    @property
    def host(self) -> int:
        """Bytes of the machine's memory."""
        return sum(item.host for item in self.items)

    @property
    def device(self) -> int:
        """Bytes on devices."""
        return sum(item.device for item in self.items)

    @property
    def total(self) -> int:
        """All bytes."""
        return self.host + self.device

    @property
    def resident(self) -> int:
        """All bytes without those that are only reserved."""
        return self.total - sum(item.idle for item in self.items)

    def item(self, name: str) -> Item:
        """The part called `name`."""
        return next(item for item in self.items if item.name == name)

    def fits(self, room: Room) -> bool:
        """Whether there is room for it."""
        return self.host <= room.host and self.device <= room.device

    def longest_context(self, room: Room) -> int:
        """The longest context, a multiple of 256 tokens, that fits with all else as it is; 0 if none does."""

        return CONTEXT_STEP * _largest(
            lambda steps: self._with_context(steps * CONTEXT_STEP).fits(room), MAX_CONTEXT // CONTEXT_STEP
        )

    def most_buckets(self, room: Room) -> int:
        """The most buckets, at most as many as asked for, that fit with all else as it is; 0 if none does."""
        return _largest(lambda count: self._with_buckets(count).fits(room), len(self.setup.buckets.bases))

    def advice(self, room: Room) -> str:
        """What to change so that it fits, in one line of flags; empty if it fits as it is."""
        if self.fits(room):
            return ""
        found = []
        if buckets := self.most_buckets(room):
            found.append(f"`buckets={buckets}`")
        smaller = self._with_small_caches()
        if smaller is not None and smaller.fits(room):
            found.append("`cache_type_k=q8_0` `cache_type_v=q8_0`")
        if (longest := self.longest_context(room)) >= CONTEXT_STEP:
            found.append(f"`ctx_size={longest}`")
        if found:
            return f"{' or '.join(found)} would fit; `force` tries it as it is"
        if longest := self._with_buckets(1).longest_context(room):
            return f"`buckets=1` `ctx_size={longest}` would fit; `force` tries it as it is"
        return "take a smaller model or quantisation, or close other programs; `force` tries it as it is"

    def _with_context(self, size: int) -> Prediction:
        context = replace(self.setup.context, context_size=size)
        return _predict(replace(self.setup, context=context), self.shape, fused=self.fused)

    def _with_buckets(self, count: int) -> Prediction:
        buckets = replace(self.setup.buckets, bases=self.setup.buckets.bases[:count])
        return _predict(replace(self.setup, buckets=buckets), self.shape, fused=self.fused)

    def _with_small_caches(self) -> Prediction | None:
        """The same with caches of q8_0, None where they are no smaller or llama.cpp cannot make them."""
        config = self.setup.context
        if {config.cache_type_k, config.cache_type_v} <= _BLOCK_TYPES or config.flash_attention == "off":
            return None
        if any(length % _BLOCK_ELEMENTS for length in self.shape.head_lengths):
            return None
        small = replace(config, cache_type_k="q8_0", cache_type_v="q8_0")
        return _predict(replace(self.setup, context=small), self.shape, fused=self.fused)


def predict(model: CheckedModel, context: ContextConfig, buckets: Buckets) -> Prediction:
    """What a set-up needs; the context size (at least 1) counts as it is.

    For the engine "auto", the larger of what the two need.
    """
    shape, setup = MemoryShape.of(model), Setup(model.config.gpu_layers, context, buckets)
    both = context.engine == "auto" and (context.slots > 1 or len(buckets.bases) > 1)
    kinds = (False, True) if both else (context.engine == "fused",)
    return max((_predict(setup, shape, fused=fused) for fused in kinds), key=lambda found: found.total)


def check_memory(model: CheckedModel, context: ContextConfig, buckets: Buckets) -> Prediction:
    """The prediction for a set-up. Raises OutOfMemoryError if it does not fit, unless `context.force`."""
    prediction = predict(model, context, buckets)
    room = free_room(model.config.gpu_layers)
    if context.force or prediction.fits(room):
        return prediction
    parts = "; ".join(
        f"{item.name} {gibibytes(item.total)}" for item in sorted(prediction.items, key=lambda item: -item.total)[:3]
    )
    where = "on the device " if prediction.host <= room.host else ""
    needed, free = (prediction.device, room.device) if prediction.host <= room.host else (prediction.host, room.host)
    raise OutOfMemoryError(
        f"{counted(len(buckets.bases), 'bucket')} of {context.context_size:,} tokens need "
        f"{gibibytes(needed)} of memory {where}({parts}), but {gibibytes(free)} are free",
        prediction.advice(room),
    )


def free_room(gpu_layers: int) -> Room:
    """What is free now: on devices only where layers are put on them."""
    return Room(available_memory(), sum(device.free_memory for device in _offload_devices(gpu_layers)))


def _offload_devices(gpu_layers: int) -> list[Device]:
    """Where llama.cpp puts layers; a build for devices may find none, or none that is reached yet (RPC)."""
    if gpu_layers == 0 or not supports_offload():
        return []
    return [device for device in devices() if not device.name.upper().startswith(_HOST_DEVICES)]


def _cuda_devices(gpu_layers: int) -> list[Device]:
    return [device for device in _offload_devices(gpu_layers) if device.name.upper().startswith("CUDA")]


def available_memory() -> int:
    """The bytes of memory this process can still take, limits of its control groups included."""
    return min([int(psutil.virtual_memory().available), *_cgroup_room()])


def _predict(setup: Setup, shape: MemoryShape, *, fused: bool) -> Prediction:
    config, buckets = setup.context, len(setup.buckets.bases)
    extra = _extra_context(setup)
    columns = buckets + extra
    if fused:
        contexts, sequences = 1, config.slots * columns
        stream_cells = _padded(config.context_size)
        cells = stream_cells * sequences
    else:
        contexts, sequences = columns, config.slots + 1  # the spare one
        stream_cells = cells = _padded(config.context_size * config.slots)
    flash = config.flash_attention != "off"
    tokens = min(cells, config.ubatch_size, config.batch_size)
    tokens = -(-tokens // sequences) * sequences  # graph_reserve takes as many of each sequence
    per_token = shape.kv_bytes(config.cache_type_k, config.cache_type_v, flash=flash)
    scores = 0 if flash else shape.score_bytes(stream_cells, tokens)
    quantised = config.cache_type_k in _BLOCK_TYPES or config.cache_type_v in _BLOCK_TYPES
    graph = shape.graph_bytes(tokens, sequences, scores=scores, quantised=quantised)
    masks = shape.mask_bytes(stream_cells, tokens, flash=flash)
    share = _device_share(setup.gpu_layers, shape)
    caches = contexts * (cells * per_token + sequences * shape.state_bytes)
    compute = contexts * (graph + masks)
    weights = shape.weight_bytes - shape.embedding_bytes
    # Where everything lies on devices, the host looks embeddings up and makes the masks.
    inputs = contexts * (masks + 2 * _FLOAT * shape.embedding * tokens)
    # Probabilities, what they weigh, and their opposites, of each bucket, and what comes of them.
    merging = _FLOAT * config.slots * shape.vocabulary * (3 * buckets + 1) if share and fused and buckets > 1 else 0
    device = len(_cuda_devices(setup.gpu_layers)) * (_CUDA_BYTES + contexts * _CUDA_CONTEXT_BYTES)
    if device and (scores or shape.multiplies_floats):
        device += contexts * (_CUBLAS_BYTES + scores // 2)
    scratch = idle = 0
    if not fused and buckets > 1 and config.prefill != "exact" and config.cache_type_k not in _BLOCK_TYPES:
        workers = plan_workers(buckets, config.threads or available_cores()).workers
        scratch = min(workers, contexts - 1) * tokens * per_token
        idle = (contexts - 1) * (graph + masks - _few_tokens(shape, stream_cells, config, sequences))
    # Where rows are turned, and as they are made up.
    rows = tokens + sequences if fused and buckets > 1 else 0
    tables = shape.table_bytes * rows
    divisors = shape.divisor_bytes * min(rows, MOST_DIVIDED_ROWS) if share else 0
    on_devices = round(share * tables) + divisors * len(_offload_devices(setup.gpu_layers))
    items = (
        _split("weights", shape.weight_bytes, round(share * weights)),
        _split("caches", caches, round(share * caches)),
        Item("compute", compute if share < 1 else inputs, compute if share else 0, 0 if share else idle),
        _split("outputs", contexts * sequences * shape.vocabulary * 4, 0),
        Item("logits", _array_bytes(buckets, config.slots, shape), merging),
        _split("device", device, device),
        _split("transfer", scratch, 0),
        Item("tables", 2 * tables - round(share * tables) + divisors, on_devices),
        _split("working", contexts * (shape.graph_overhead + shape.work_bytes(tokens)), 0),
        _split("tokenizer", shape.tokenizer_bytes, 0),
        _split("adapters", shape.adapter_bytes, round(share * shape.adapter_bytes)),
    )
    return Prediction(setup, shape, fused, contexts, cells, per_token, items)


def outputs_at_once(model: CheckedModel, config: ContextConfig, buckets: int, *, fused: bool) -> int:
    """After how many tokens a batch may give the logits in each bucket without a larger compute buffer; at least 1.

    The logits of all buckets take at most 64 MiB.
    """
    shape = MemoryShape.of(model)
    tokens = min(config.ubatch_size, config.batch_size, config.context_size)
    without = shape.graph_bytes(tokens, 0)
    columns = buckets if fused else 1
    limit = _OUTPUT_BYTES // (_FLOAT * shape.vocabulary * buckets)
    return max(1, _largest(lambda outputs: shape.graph_bytes(tokens, outputs * columns) <= without, limit))


def _few_tokens(shape: MemoryShape, cells: int, config: ContextConfig, outputs: int) -> int:
    """Bytes of a compute buffer that prompts too short to be shared reach."""
    flash = config.flash_attention != "off"
    scores = 0 if flash else shape.score_bytes(cells, MIN_SHARED_TOKENS)
    graph = shape.graph_bytes(MIN_SHARED_TOKENS, outputs, scores=scores)
    return graph + shape.mask_bytes(cells, MIN_SHARED_TOKENS, flash=flash)


def _split(name: str, total: int, device: int) -> Item:
    return Item(name, total - device, device)


def _extra_context(setup: Setup) -> int:
    """1 where a context that is no bucket computes a shared prefill."""
    buckets = setup.buckets
    if setup.context.prefill == "exact" or len(buckets.bases) == 1:
        return 0
    return int(buckets.prefill_base not in buckets.bases)


def _array_bytes(buckets: int, slots: int, shape: MemoryShape) -> int:
    """Our own arrays: logits and a copy, exponentials and results of the merge, a sampler's candidates."""
    return 4 * shape.vocabulary * (2 * slots * buckets + buckets + 2 + 4 * slots)


def _device_share(gpu_layers: int, shape: MemoryShape) -> float:
    """The part of the layers, the output counted as one, that goes to devices."""
    if not _offload_devices(gpu_layers):
        return 0.0
    layers = shape.layers + 1
    return 1.0 if gpu_layers < 0 else min(gpu_layers, layers) / layers


def all_on_devices(model: CheckedModel) -> bool:
    """Whether all layers of the model go to devices with memory of their own."""
    return _device_share(model.config.gpu_layers, MemoryShape.of(model)) == 1.0


def _padded(cells: int) -> int:
    return -(-cells // CONTEXT_STEP) * CONTEXT_STEP


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number of 0..limit for which `fits` holds; it holds for 0 and, once it fails, for no larger one."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _cgroup_room() -> list[int]:
    """What each limit on the memory of this process's control groups leaves; nothing outside Linux."""
    folders = [_CGROUPS, _CGROUPS / "memory"]
    try:
        names = [line.rpartition(":")[2].strip("/") for line in _OWN_CGROUP.read_text().splitlines()]
    except OSError:
        names = []
    for name in filter(None, names):
        for root in (_CGROUPS, _CGROUPS / "memory"):
            folder = root / name
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    rooms = []
    for folder in dict.fromkeys(folders):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                limit = int((folder / limit_name).read_text())
                used = int((folder / used_name).read_text())
            except (OSError, ValueError):
                continue  # no limit, or another version of control groups
            if limit < _UNLIMITED:
                rooms.append(max(0, limit - max(0, used - _reclaimable(folder))))
    return rooms


def _reclaimable(folder: Path) -> int:
    """Bytes of files in memory that the system drops when memory is short; mapped weights are among them."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
