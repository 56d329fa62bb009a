"""A model's inspection, the cost of its buckets and the checks of a file, as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from abcli.chat.calls.format import CallFormat
from abcli.gguf.description import (
    AdapterInspection,
    Inspection,
    Rope,
    Template,
    TensorKind,
    Tokenizer,
    TypeShare,
)
from abcli.gguf.verification import Check
from abcli.machine import Prediction, Room
from abcli.text import counted, gibibytes
from abcli.ui.terminal import in_flags, one_line, printable

_ROTATIONS = {
    "pairs": "neighbouring pairs (NORM)",
    "halves": "halves of a head (NEOX)",
    "sections": "positions of several parts (M-RoPE)",
    "none": "none",
    "unknown": "unknown to abcli; llama.cpp decides",
}
_ITEMS = {
    "weights": "weights",
    "caches": "keys and values",
    "compute": "compute buffers",
    "outputs": "llama.cpp's outputs",
    "logits": "merging and sampling",
    "device": "the device's libraries",
    "transfer": "sharing a prefill",
    "working": "graphs and scratch",
    "tokenizer": "tokenizer",
    "adapters": "LoRA adapters",
}
_MARKS = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}
_MAX_TEXT = 60
_MAX_KINDS = 30
_MAX_RANGES = 8


def inspection_text(found: Inspection, form: CallFormat | None = None) -> str:
    """A line per property, then a table of the types of tensors; `form` is the chat template's."""
    rows = [
        ("model", _shown(found.name) if found.name else "-"),
        ("architecture", found.architecture),
        ("parameters", f"{count_text(found.parameters)} at {found.bits_per_weight:.2f} bits per weight"),
        ("layers", f"{found.layers} of {found.embedding_length} dimensions"),
        ("heads", f"{_span(found.heads)}, {_span(found.kv_heads)} of keys and values, {_lengths(found)}"),
        ("feed forward", _span(found.feed_forward)),
        ("trained context", f"{found.trained_context:,} tokens"),
        ("rope", _rope(found.rope)),
        ("tokenizer", _tokenizer(found.tokenizer)),
        ("chat template", _template(found.template)),
    ]
    if found.experts:
        rows.insert(6, ("experts", f"{found.experts_used} of {found.experts}"))
    if found.window is not None:
        which, numbers = "some layers", found.window.layers
        if numbers is not None:
            which = f"{len(numbers)} of {found.layers} layers ({_ranges(numbers)})"
        rows.insert(-2, ("sliding window", f"{which} see the last {found.window.tokens:,} tokens"))
    if form is not None:
        rows.append(("tool calls", _calls(form, thinks=found.template is not None and found.template.thinking)))
    if found.licence:
        rows.insert(1, ("licence", _shown(found.licence)))
    rows += [
        (
            "file" if len(found.parts) == 1 else f"part {number}",
            f"{_shown(part.path.name)}, {gibibytes(part.size_bytes)}",
        )
        for number, part in enumerate(found.parts, 1)
    ]
    return _rows(rows) + "\n" + _type_table(found.types) + "\n" + _kind_table(found.tensor_kinds)


def adapter_text(found: AdapterInspection) -> str:
    """A line per property of a LoRA file."""
    made_for = f", made for {_shown(found.base_model)}" if found.base_model else ""
    ranks = " and ".join(f"{rank} ({factor:g} times)" for rank, factor in zip(found.ranks, found.factors, strict=True))
    rows = [
        ("lora", _shown(found.name) if found.name else "-"),
        ("architecture", f"{found.architecture}{made_for}"),
        ("rank", f"{ranks}; alpha {found.alpha:g}, scale {found.scale:g}"),
        ("changes", ", ".join(f"{_shown(kind)} x {count}" for kind, count in found.changes)),
        ("parameters", f"{count_text(found.parameters)}, {', '.join(share.type_name for share in found.types)}"),
        ("file", f"{_shown(found.path.name)}, {gibibytes(found.size_bytes)}"),
    ]
    if found.licence:
        rows.insert(1, ("licence", _shown(found.licence)))
    if found.left_out:
        rows.insert(-2, ("left out", f"{found.left_out} norms, which llama.cpp passes over"))
    for title, text in (("task", found.task), ("prompt prefix", found.prompt_prefix)):
        if text:
            rows.insert(-2, (title, _shown(text)))
    return _rows(rows)


def cost_text(prediction: Prediction, room: Room) -> str:
    """What a set-up needs and whether there is room for it."""
    config, buckets = prediction.setup.context, len(prediction.setup.buckets.bases)
    title = f"{counted(buckets, 'bucket')}, context of {config.context_size:,} tokens"
    if config.slots > 1:
        title += f" for each of {config.slots} slots"
    rows = [(_ITEMS[item.name], gibibytes(item.total)) for item in prediction.items if item.total]
    extra = prediction.contexts - buckets
    rows[1] = (rows[1][0], f"{rows[1][1]} ({_caches(prediction, extra)})")
    rows.append(("in all", gibibytes(prediction.total)))
    if prediction.resident < prediction.total:
        rows.append(("", f"{gibibytes(prediction.resident)} while prompts are computed once for all buckets"))
    rows.append(("free", gibibytes(room.host) + (f", {gibibytes(room.device)} on devices" if room.device else "")))
    if prediction.device:
        rows.append(("on devices", gibibytes(prediction.device)))
    longest = prediction.longest_context(room)
    rows.append(("longest context", f"{longest:,} tokens" if longest else "none fits"))
    advice = prediction.advice(room)
    if advice:
        rows.append(("does not fit", in_flags(advice)))
    return f"{title}, caches of {config.cache_type_k} and {config.cache_type_v}\n" + _rows(rows)


def check_line(check: Check) -> str:
    """One line for the outcome of a check, two if there is something to do."""
    line = f"{_MARKS[check.status]:8}{check.name}: {_shown(check.detail, 2000)}"
    return f"{line}\n{'':8}hint: {_shown(check.hint, 2000)}" if check.hint else line


def count_text(count: int) -> str:
    """A number of parameters for people, e.g. "134.5 M"."""
    number, unit = float(count), ""
    for larger in ("k", "M", "G", "T"):
        if number < 999.95:
            break
        number, unit = number / 1000, larger
    return f"{number:.1f} {unit}" if unit else str(count)


def _caches(prediction: Prediction, extra: int) -> str:
    per_token = prediction.kv_bytes_per_token
    text = f"{per_token / 1024:.1f} KiB per token and bucket"
    if prediction.fused or extra <= 0:
        return text
    return f"{text}; one context more, to compute prompts"


def _lengths(found: Inspection) -> str:
    if found.key_length == found.value_length:
        return f"{found.key_length} numbers each"
    return f"{found.key_length} numbers a key, {found.value_length} a value"


def _rope(rope: Rope) -> str:
    if rope.rotation == "none":
        return _ROTATIONS["none"]
    parts = [_ROTATIONS[rope.rotation], f"base {rope.base:g}"]
    if rope.window_base is not None:
        parts.append(f"base {rope.window_base:g} in layers with a window")
    parts.append(f"{rope.dimensions} dimensions")
    if rope.scaling != "none":
        factor = f" by {rope.factor:g}" if rope.factor is not None else ""
        origin = f" from {rope.original_context:,} tokens" if rope.original_context is not None else ""
        parts.append(f"{rope.scaling} scaling{factor}{origin}")
    if rope.factors:
        parts.append(f"factors in {', '.join(rope.factors)}")
    return ", ".join(parts)


def _tokenizer(tokenizer: Tokenizer) -> str:
    special = ", ".join(
        f"{token.role} {token.token} {_shown(token.text) if token.text is not None else '(outside)'}"
        for token in tokenizer.special
    )
    kind = f"{_shown(tokenizer.model)} ({_shown(tokenizer.splitting)}), {tokenizer.tokens:,} tokens"
    return f"{kind}; {special}" if special else kind


def _template(template: Template | None) -> str:
    if template is None:
        return "none"
    known = [name for name, there in (("tools", template.tools), ("thinking", template.thinking)) if there]
    parts = [f"{template.characters:,} characters", f"mentions {' and '.join(known)}" if known else ""]
    parts.append(f"others: {', '.join(_shown(name) for name in template.others)}" if template.others else "")
    return ", ".join(filter(None, parts))


def _calls(form: CallFormat, *, thinks: bool) -> str:
    parts = [f"{form.name}, the template having none" if form.fallback else form.name]
    if not form.several:
        parts.append("one at a time")
    if thinks and form.thoughts is not None:
        parts.append(f"thoughts between {form.thoughts.begin.strip()} and {form.thoughts.end}")
    return "; ".join(printable(one_line(part)) for part in parts)


def _type_table(types: Iterable[TypeShare]) -> str:
    lines = [f"{'TYPE':8}{'TENSORS':>9}{'SIZE':>12}{'SHARE':>8}{'BITS':>7}"]
    lines += [
        f"{share.type_name:8}{share.tensors:>9,}{gibibytes(share.size_bytes):>12}{share.share:>8.1%}"
        f"{share.bits_per_weight:>7.2f}"
        for share in types
    ]
    return "\n".join(lines) + "\n"


def _kind_table(kinds: Sequence[TensorKind]) -> str:
    """The types of the tensors of each name, the largest first; a stranger's file may have any number of names."""
    lines = [f"{'TENSOR':30}{'SIZE':>12}  TYPES"]
    for kind in kinds[:_MAX_KINDS]:
        types = ", ".join(f"{count:,} {name}" for name, count in kind.types.items())
        lines.append(f"{_shown(kind.name, 29):30}{gibibytes(kind.size_bytes):>12}  {types}")
    if len(kinds) > _MAX_KINDS:
        lines.append(f"and {len(kinds) - _MAX_KINDS:,} more names")
    return "\n".join(lines) + "\n"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in few characters: "0-4, 6-10, ..."."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    shown = [f"{low}-{high}" if low < high else str(low) for low, high in runs[:_MAX_RANGES]]
    return ", ".join(shown) + (", ..." if len(runs) > _MAX_RANGES else "")


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{name:22}{text}\n" for name, text in rows)


def _span(counts: tuple[int, ...]) -> str:
    """The one number of all layers, or the smallest and the largest."""
    if not counts:
        return "0"
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _shown(text: str, limit: int = _MAX_TEXT) -> str:
    """Text of a stranger's file on one line, without what a terminal would obey."""
    clean = printable(one_line(text))
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
