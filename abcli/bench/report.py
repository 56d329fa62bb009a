"""The result of a benchmark: a row for each contender, and the object that `--json` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from abcli.bench.measure import Findings
from abcli.bench.plan import ONE_BUCKET, BenchSettings, Contender, Phase
from abcli.bench.resident import Memory
from abcli.bench.rounds import Spread
from abcli.bench.workshop import AutoChoice
from abcli.config import ContextConfig
from abcli.version import __version__

SCHEMA = 1
_SECONDS_DECIMALS = 9
_RATIO_DECIMALS = 4
_SPEED_DECIMALS = 3


@dataclass(frozen=True)
class Timing:
    """How long a token took, in seconds, one number a round, and its ratios to others in the same rounds.

    `to_one_bucket` is empty where the contender is what is compared with, `to_raw` where there is no raw batch.
    """

    seconds: tuple[float, ...]
    to_one_bucket: tuple[float, ...]
    to_raw: tuple[float, ...]

    @property
    def speed(self) -> Spread:
        """Tokens per second."""
        return Spread.of([1 / seconds for seconds in self.seconds])

    @property
    def ratio(self) -> Spread | None:
        """Times as long as one bucket; None where that is not known."""
        return Spread.of(self.to_one_bucket) if self.to_one_bucket else None

    @property
    def overhead(self) -> Spread | None:
        """Times as long as llama.cpp's own batch of as many sequences; None where that is not known."""
        return Spread.of(self.to_raw) if self.to_raw else None


@dataclass(frozen=True)
class Row:
    """One contender. `shared` and `exact` are prompts that one bucket computes for all, and that each computes."""

    contender: Contender
    bases: tuple[float, ...]
    decode: Timing | None
    shared: Timing | None
    exact: Timing | None
    memory: Memory | None
    prompt_note: str
    turning_note: str


@dataclass(frozen=True)
class Circumstances:
    """What the numbers depend on besides the settings; `devices` are (name, description)."""

    model: str
    description: str
    fingerprint: str
    llama_cpp: str
    devices: tuple[tuple[str, str], ...]
    threads: int
    gpu_layers: int
    config: ContextConfig


@dataclass(frozen=True)
class BenchReport:
    """All of a benchmark; `complete` is false if it was interrupted or failed."""

    settings: BenchSettings
    circumstances: Circumstances
    rows: tuple[Row, ...]
    left_out: tuple[tuple[Contender, str], ...]
    choices: tuple[tuple[int, AutoChoice], ...]
    complete: bool
    other_cores: float


def make_report(
    settings: BenchSettings,
    circumstances: Circumstances,
    findings: Findings,
    bases: Callable[[int], tuple[float, ...]],
) -> BenchReport:
    """The rows of all contenders that have numbers, in the order of the settings; `bases` are those of N buckets."""
    rows = []
    for contender in settings.contenders:
        timings = {phase: _timing(findings, contender, phase) for phase in ("decode", "shared", "exact")}
        if any(timings.values()):
            rows.append(
                Row(
                    contender=contender,
                    bases=() if contender.kind == "raw" else bases(contender.buckets),
                    memory=findings.memory.get(contender),
                    prompt_note=findings.prompt_notes.get(contender, ""),
                    turning_note=findings.turning_notes.get(contender, ""),
                    **timings,
                )
            )
    return BenchReport(
        settings,
        circumstances,
        tuple(rows),
        tuple(findings.left_out.items()),
        tuple(findings.choices.items()),
        findings.complete,
        findings.other_cores,
    )


def as_json(report: BenchReport) -> dict[str, Any]:
    """The object that `--json` prints; see docs/bench.md."""
    settings, where = report.settings, report.circumstances
    config = where.config
    return {
        "schema": SCHEMA,
        "abcli": __version__,
        "llama_cpp": where.llama_cpp,
        "devices": [{"name": name, "description": description} for name, description in where.devices],
        "model": {"name": where.model, "description": where.description, "fingerprint": where.fingerprint},
        "settings": {
            "buckets": list(settings.buckets),
            "prompt_tokens": settings.prompt_tokens,
            "new_tokens": settings.new_tokens,
            "rounds": {phase: settings.rounds_of(phase) for phase in ("decode", "shared", "exact")},
            "threads": where.threads,
            "batch_size": config.batch_size,
            "ubatch_size": config.ubatch_size,
            "gpu_layers": where.gpu_layers,
            "flash_attention": config.flash_attention,
            "cache_type_k": config.cache_type_k,
            "cache_type_v": config.cache_type_v,
            "memory_context": settings.context_size,
        },
        "complete": report.complete,
        "other_cores": round(report.other_cores, 2),
        "rows": [_row(row) for row in report.rows],
        "left_out": [
            {"buckets": contender.buckets, "engine": contender.kind, "reason": reason}
            for contender, reason in report.left_out
        ],
        "auto": [{"buckets": buckets, **asdict(choice)} for buckets, choice in report.choices],
    }


def _timing(findings: Findings, contender: Contender, phase: Phase) -> Timing | None:
    found = findings.rounds.get((contender.buckets, phase))
    seconds = found.seconds(contender) if found is not None else ()
    if found is None or not seconds:
        return None
    raw = Contender(contender.buckets, "raw")
    return Timing(
        seconds,
        () if contender == ONE_BUCKET else found.ratios(contender, ONE_BUCKET),
        () if contender == raw else found.ratios(contender, raw),
    )


def _row(row: Row) -> dict[str, Any]:
    memory = None
    if row.memory is not None:
        memory = {
            "resident_bytes": row.memory.resident,
            "device_bytes": row.memory.device,
            "predicted_bytes": row.memory.predicted,
        }
    return {
        "buckets": row.contender.buckets,
        "engine": row.contender.kind,
        "bases": list(row.bases),
        "decode": _timing_json(row.decode),
        "prompt_shared": _timing_json(row.shared),
        "prompt_exact": _timing_json(row.exact),
        "prompt_note": row.prompt_note or None,
        "turning_note": row.turning_note or None,
        "memory": memory,
    }


def _timing_json(timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    return {
        "tokens_per_second": _spread(timing.speed, _SPEED_DECIMALS),
        "ms_per_token": round(1e3 * Spread.of(timing.seconds).median, _SPEED_DECIMALS),
        "ratio_to_one_bucket": _spread(timing.ratio, _RATIO_DECIMALS),
        "ratio_to_raw_batch": _spread(timing.overhead, _RATIO_DECIMALS),
        "seconds_per_token": _rounded(timing.seconds),
    }


def _spread(spread: Spread | None, decimals: int) -> dict[str, float] | None:
    return None if spread is None else {name: round(value, decimals) for name, value in asdict(spread).items()}


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, _SECONDS_DECIMALS) for value in values]
