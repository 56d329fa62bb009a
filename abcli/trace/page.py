"""A trace as one HTML file."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abcli.atomic import write_atomically
from abcli.errors import UsageError
from abcli.pages.charts import Chart, Series, chart
from abcli.pages.rendering import render
from abcli.trace.trace import Attention, Candidate, Step, Trace

_LEVELS = 9
# Columns of the charts by distance.
_COLUMNS = 160
_MANY = 1.5
_LEAST = 0.01
_DIGITS = 6


def trace_page(trace: Trace) -> str:
    """The page, which opens from the disk without a network. Whatever texts the trace has are shown as text."""
    names = bucket_names(trace.bases, trace.native_base, trace.native)
    agreements = [step.agreement for step in trace.steps if step.agreement is not None]
    facts = [
        ("model", trace.model),
        ("buckets", ", ".join(names)),
        ("merge", trace.merge),
        ("prompt", f"{len(trace.prompt):,} tokens"),
        ("answer", f"{len(trace.steps):,} tokens"),
    ]
    if agreements:
        facts.append(("agreement", f"{np.mean(agreements):.1%}"))
    attention = trace.attention
    return render(
        "trace.html",
        "trace.js",
        title=f"What the buckets saw: {trace.model}",
        facts=facts,
        names=names,
        steps=[_shown(step, trace.native, len(names)) for step in trace.steps],
        attention=None if attention is None else {"names": [*names, "merged"], "said": _said(attention)},
        without_attention=f"The attention could not be read: {trace.without_attention or 'there is no answer'}.",
        passages=_passages(trace),
        charts=_charts(trace, names),
        data={
            "names": names,
            "native": trace.native,
            "steps": [_data(step, trace.native) for step in trace.steps],
            "attention": None if attention is None else _packed(attention, trace.passages),
        },
    )


def save_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace to a file: JSON for .json, else the page. Raises UsageError if it cannot be written."""
    path = Path(path)
    check_name(path)
    text = json.dumps(trace.fields(), ensure_ascii=False) if path.suffix.lower() == ".json" else trace_page(trace)
    try:
        # Half a character of a prompt may stand alone.
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "name another file") from None


def check_name(path: Path) -> None:
    """Raise UsageError for a name that promises something else than a trace is written as."""
    if path.suffix.lower() not in (".html", ".htm", ".json"):
        raise UsageError(f"a trace cannot be written as {path.name!r:.80}", "end the name in .html or .json")


def bucket_names(bases: Sequence[float], native_base: float, native: int) -> list[str]:
    """Each base as a multiple of the model's own; the bucket `native` is marked: it has that base, or the nearest."""
    mark = " (native)" if np.isclose(bases[native], native_base) else " (nearest to native)"
    return [
        f"{base / native_base:.4g}×" + (mark if bucket == native else "")  # noqa: RUF001 - times
        for bucket, base in enumerate(bases)
    ]


def _shown(step: Step, native: int, buckets: int) -> dict[str, Any]:
    disagreement = 0.0 if step.agreement is None else 1 - step.agreement
    own = [""] * buckets
    for view in step.views:
        own[view.bucket] = view.candidates[0].text
    told = "one bucket alone" if step.agreement is None else f"agreement {step.agreement:.0%}"
    return {
        "text": visible(step.text),
        "ends_line": step.text.endswith("\n"),
        "level": _level(disagreement, 1.0),
        "differs": step.differs(native),
        "said": told + (", not the native bucket's choice" if step.differs(native) else ""),
        "probability": f"{step.probability:.1%}",
        "agreement": "" if step.agreement is None else f"{step.agreement:.1%}",
        "own": own,
    }


def visible(text: str) -> str:
    """A token's text for a button: line ends are shown, and what has no text of its own."""
    return text.replace("\n", "↵") or "·"


def _said(attention: Attention) -> str:
    layers = sorted({layer for layer, _head in attention.heads})
    return (
        f"Mean of the {len(attention.heads)} heads that look back furthest (layers {layers[0]} to {layers[-1]}). "
        "The first token, on which heads rest that look at nothing, does not count for the shades."
    )


def _passages(trace: Trace) -> list[dict[str, Any]]:
    if trace.attention is None:
        return [
            {"tokens": [{"text": text, "level": 0} for text in trace.prompt[start:end]], "cells": []}
            for start, end in trace.passages
        ]
    whole = trace.attention.whole
    merged = whole[-1]
    most = float(merged[1:].max(initial=0))
    sums = np.add.reduceat(whole, [start for start, _end in trace.passages], axis=1)
    largest = float(sums[:, 1:].max(initial=0))
    found = []
    for index, (start, end) in enumerate(trace.passages):
        tokens = [
            {"text": trace.prompt[place], "level": _level(float(merged[place]), most) if place else 0}
            for place in range(start, end)
        ]
        native = float(sums[trace.native, index])
        cells = [{"text": _cell(float(sum_), native), "level": _level(float(sum_), largest)} for sum_ in sums[:, index]]
        found.append({"tokens": tokens, "cells": cells})
    return found


def _cell(share: float, native: float) -> str:
    mark = ""
    if share >= _MANY * native and share >= _LEAST:
        mark = "▲ "
    elif share <= native / _MANY and native >= _LEAST:
        mark = "▼ "
    return f"{mark}{100 * share:.{2 if share < _LEAST else 1}f}"


def _level(share: float, most: float) -> int:
    return int(min(_LEVELS, np.ceil(_LEVELS * np.sqrt(share / (most or 1.0)))))


def _charts(trace: Trace, names: Sequence[str]) -> list[Chart]:
    # The native bucket comes first, and is drawn as such.
    order = sorted(range(len(names)), key=lambda bucket: bucket != trace.native)
    charts = []
    if trace.waves.shape[1] > 1:
        series = [Series(names[bucket], *_columns(trace.waves[bucket])) for bucket in order]
        percent = "{:.0%}".format
        charts.append(chart("Waves of the bases", series, "distance (tokens)", "A(D) / A(0)", y_text=percent, marks=0))
    if trace.attention is not None and trace.attention.by_distance.shape[1] > 1:
        measured = trace.attention.by_distance
        series = [Series(names[bucket], *_columns(measured[bucket])) for bucket in order]
        charts.append(
            chart(
                "Attention by distance",
                series,
                "distance (tokens)",
                "share of attention",
                y_text="{:.3g}".format,
                log_y=True,
                marks=0,
            )
        )
    return charts


def _columns(values: NDArray[np.float32]) -> tuple[list[float], list[float]]:
    """The means of equal parts of `values` [n], and where each begins."""
    starts = np.unique(np.linspace(0, len(values), min(_COLUMNS, len(values)), endpoint=False).astype(int))
    sums = np.add.reduceat(values.astype(np.float64), starts)
    sizes = np.diff([*starts, len(values)])
    return [float(start) for start in starts], [float(mean) for mean in sums / sizes]


def _data(step: Step, native: int) -> dict[str, Any]:
    return {
        "token": step.token,
        "agreement": None if step.agreement is None else round(step.agreement, _DIGITS),
        "differs": step.differs(native),
        "probability": round(step.probability, _DIGITS),
        "candidates": _candidates(step.candidates),
        "views": [
            {
                "bucket": view.bucket,
                "weight": round(view.weight, _DIGITS),
                "probability": round(view.probability, _DIGITS),
                "candidates": _candidates(view.candidates),
            }
            for view in step.views
        ],
    }


def _candidates(candidates: Sequence[Candidate]) -> list[list[Any]]:
    return [[one.token, visible(one.text), round(one.probability, _DIGITS)] for one in candidates]


def _packed(attention: Attention, passages: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Attention as a page has it: half precision, so that long texts stay small."""
    return {
        "rows": attention.whole.shape[0],
        "tokens": attention.whole.shape[1],
        "steps": attention.steps,
        "kept": attention.strongest.shape[2],
        "spans": [list(passage) for passage in passages],
        "whole": _halves(attention.whole),
        "passages": _halves(attention.passages),
        "strongest": b64encode(attention.strongest.astype("<u4").tobytes()).decode(),
        "weights": _halves(attention.strongest_weights),
    }


def _halves(values: NDArray[np.float32]) -> str:
    return b64encode(values.astype("<f2").tobytes()).decode()
