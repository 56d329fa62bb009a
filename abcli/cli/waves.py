"""`abcli waves`: the attention waveform of each bucket, and searches for sets of bases that complement each other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abcli.chat.files import read_text_file
from abcli.cli._flags import flag
from abcli.cli._model_name import ModelNameOptions
from abcli.cli._options import BucketOptions
from abcli.config import MAX_BUCKETS, BucketConfig
from abcli.errors import UsageError
from abcli.gguf.check import check_file
from abcli.gguf.header import Header
from abcli.hub.locate import locate_model
from abcli.rope.bases import parse_numbers
from abcli.rope.waveform import EXTREMA_RADIUS, WaveSummary, summarise, value_at_zero
from abcli.rope.waves import MAX_VALUES, Objective, Search, Waves, compute_waves
from abcli.trace.measuring import Measurement, common_text, measurer
from abcli.ui.plots import AttentionPlot, ImageFormat, WavePlot, attention_image, require_matplotlib, wave_image
from abcli.ui.terminal import Terminal, on_interrupt, printable
from abcli.ui.waves import show_measurement, wave_names, wave_plot

_DEFAULT_OBJECTIVE: Objective = "paper"
_DEFAULT_RANGE = "0.5,2.5"
_DEFAULT_CANDIDATES = 201
_DEFAULT_TEXTS, _MOST_TEXTS = 4, 1000
# Tokens of a text on which attention is measured: longer ones take their time.
_MEASURED_CONTEXT, _LEAST_MEASURED = 1024, 16


@dataclass(frozen=True)
class SearchOptions:
    """Whether to search for bases, and how."""

    panel: ClassVar[str] = "Search"

    search: Annotated[
        int | None, flag(f"Search N bases that complement each other, 2 to {MAX_BUCKETS}.", "--search", metavar="N")
    ] = None
    objective: Annotated[
        Objective | None,
        flag(
            "paper: peaks on troughs; envelope: the highest lowest point.",
            "--objective",
            show_default=_DEFAULT_OBJECTIVE,
        ),
    ] = None
    span: Annotated[
        str | None,
        flag("Multiples of the native base to search.", "--range", metavar="LOW,HIGH", show_default=_DEFAULT_RANGE),
    ] = None
    candidates: Annotated[
        int | None, flag("Bases to try in the range.", "--candidates", show_default=str(_DEFAULT_CANDIDATES))
    ] = None

    def config(self) -> Search | None:
        """The search that the flags ask for, None without --search. Raises UsageError."""
        if self.search is None:
            given = (("--objective", self.objective), ("--range", self.span), ("--candidates", self.candidates))
            for name, value in given:
                if value is not None:
                    raise UsageError(f"{name} {value} belongs to a search", "say how many bases: --search N")
            return None
        if not 2 <= self.search <= MAX_BUCKETS:
            raise UsageError(f"--search {self.search} is impossible", f"choose 2 to {MAX_BUCKETS}")
        ends = parse_numbers(_DEFAULT_RANGE if self.span is None else self.span, "--range")
        if len(ends) != 2 or not 0 < ends[0] < ends[1]:
            raise UsageError(
                f"--range {self.span} is impossible", f"give two ascending multiples, like {_DEFAULT_RANGE}"
            )
        candidates = _DEFAULT_CANDIDATES if self.candidates is None else self.candidates
        if not self.search <= candidates <= MAX_VALUES:
            raise UsageError(f"--candidates {candidates} is impossible", f"choose {self.search} or more")
        return Search(self.search, self.objective or _DEFAULT_OBJECTIVE, ends[0], ends[1], candidates)


@dataclass(frozen=True)
class MeasureOptions:
    """Whether to measure attention, and on what."""

    panel: ClassVar[str] = "Measurement"

    measure: Annotated[bool, flag("Measure the attention by distance, too; loads the model.", "--measure")] = False
    text: Annotated[
        Path | None, flag("The text to measure on.", "--text", metavar="FILE", show_default="Python's help topics")
    ] = None
    texts: Annotated[int, flag("Parts of the text to measure on, each -c tokens long.", "--texts")] = _DEFAULT_TEXTS

    def check(self, search: Search | None) -> None:
        """Raise UsageError for flags that contradict each other."""
        if not self.measure and (self.text is not None or self.texts != _DEFAULT_TEXTS):
            raise UsageError("--text and --texts belong to a measurement", "add --measure")
        if self.measure and search is not None:
            raise UsageError(
                "--measure and --search contradict each other", "search first, then measure what was found"
            )
        if not 1 <= self.texts <= _MOST_TEXTS:
            raise UsageError(f"--texts {self.texts} is impossible", f"choose 1 to {_MOST_TEXTS}")


def waves(
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    name_options: ModelNameOptions,
    ctx_size: Annotated[
        int, typer.Option("--ctx-size", "-c", help="Distances to look at, in tokens; 0: the trained length.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    plot: Annotated[
        bool | None, flag("Plot in the terminal.", "--plot/--no-plot", show_default="on a terminal")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write a figure; needs the extra 'plot'.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write a figure; needs the extra 'plot'.")] = None,
    search_options: SearchOptions,
    measure_options: MeasureOptions,
    bucket_options: BucketOptions,
) -> None:
    """Show the waves of a model's buckets; of the file only the header is read."""
    model = name_options.name(model_word)
    search = search_options.config()
    measure_options.check(search)
    buckets = _buckets(bucket_options, searching=search is not None)
    images: list[tuple[Path, ImageFormat]] = []
    if png is not None:
        require_matplotlib("--png")
        images.append((png, "png"))
    if svg is not None:
        require_matplotlib("--svg")
        images.append((svg, "svg"))
    terminal = Terminal()
    shows_plot = terminal.output_is_terminal if plot is None else plot
    path = locate_model(model)
    header, *_parts = check_file(path)
    if measure_options.measure:
        context = _context_size(ctx_size or min(_MEASURED_CONTEXT, header.trained_context), header)
        result = compute_waves(header, context, buckets, None)
        found = _measured(terminal, path, result, measure_options)
        for image, image_format in images:
            image.write_bytes(attention_image(_attention_figure(result, found), image_format))
        if as_json:
            terminal.write(json.dumps(_measurement_report(result, found), ensure_ascii=False) + "\n")
        else:
            show_measurement(_console(terminal), result, found, plot=shows_plot, unicode=_unicode(terminal))
        return
    with terminal.working("computing waves"):
        result = compute_waves(header, _context_size(ctx_size, header), buckets, search)
        for path, image_format in images:
            path.write_bytes(wave_image(_figure(result), image_format))
    if as_json:
        terminal.write(json.dumps(_report(result), ensure_ascii=False) + "\n")
    else:
        _show(terminal, result, plot=shows_plot)


def _measured(terminal: Terminal, path: Path, result: Waves, options: MeasureOptions) -> Measurement:
    """The attention of the model at `path` under the bases of `result`, at most as far as its waves go."""
    if result.context < _LEAST_MEASURED:
        raise UsageError(f"{result.context} tokens are too few to measure", f"choose {_LEAST_MEASURED} or more: -c")
    text = common_text() if options.text is None else read_text_file(options.text)
    with terminal.working(f"loading {path.name}") as say, measurer(path) as model, on_interrupt(model.cancel.set):
        return model.measure(
            text,
            result.context,
            options.texts,
            result.bases,
            result.waves,
            lambda done, total: say(f"measuring, {done} of {total}"),
        )


def _measurement_report(result: Waves, found: Measurement) -> dict[str, Any]:
    """The object that --measure --json prints; lists begin at distance 1."""
    return {
        "model": str(result.header.path),
        "native_base": result.native_base,
        "context": result.context,
        "texts": found.texts,
        "rows": found.rows,
        "heads": [list(head) for head in found.heads],
        "bases": [
            {
                "base": one.base,
                "ripples": [
                    {"wave": base, **asdict(ripple)} for base, ripple in zip(result.bases, one.ripples, strict=True)
                ],
                "troughs": asdict(one.troughs),
                "wave": wave[1 : 1 + len(one.mean)].tolist(),
                **{name: getattr(one, name).tolist() for name in ("mean", "lower", "median", "upper")},
            }
            for one, wave in zip(found.bases, result.waves, strict=True)
        ],
    }


def _attention_figure(result: Waves, found: Measurement) -> AttentionPlot:
    return AttentionPlot(
        f"Waves and attention of {printable(result.header.path.name)}",
        tuple(wave_names(result)),
        result.waves[:, 1 : 1 + len(found.bases[0].mean)],
        np.stack([one.median for one in found.bases]),
        np.stack([one.lower for one in found.bases]),
        np.stack([one.upper for one in found.bases]),
    )


def _buckets(options: BucketOptions, *, searching: bool) -> BucketConfig:
    """The buckets that the flags ask for. Raises UsageError for flags that have no say here."""
    buckets = options.config()
    if buckets.merge != BucketConfig().merge:
        raise UsageError(f"--merge {buckets.merge} has no say over waves", "drop it")
    if searching:
        for name, value in (
            ("--buckets", options.buckets),
            ("--bases", options.bases),
            ("--multipliers", options.multipliers),
            ("--spread", options.spread),
        ):
            if value is not None:
                raise UsageError(f"{name} {value} contradicts --search, which chooses the bases", "drop one")
    return buckets


def _context_size(wanted: int, header: Header) -> int:
    """The number of distances. Raises UsageError."""
    if wanted != 0 and not 2 <= wanted < 2**31:
        raise UsageError(f"--ctx-size {wanted} is impossible", "choose 2 or more, or 0 for the trained length")
    return wanted or max(2, header.trained_context)


def _console(terminal: Terminal) -> Console:
    return Console(file=terminal.output, highlight=False, emoji=False)


def _unicode(terminal: Terminal) -> bool:
    return (terminal.output.encoding or "").lower().startswith("utf")


def _figure(result: Waves) -> WavePlot:
    others = [index for index, base in enumerate(result.bases) if base != result.native_base]
    names = wave_names(result)
    return WavePlot(
        f"Attention waveform of {printable(result.header.path.name)}, native base {result.native_base:,g}",
        tuple(names[index] for index in others),
        result.waves[others],
        result.native,
        result.envelope,
    )


def _show(terminal: Terminal, result: Waves, *, plot: bool) -> None:
    """The table, the comparison, how to use what a search found, and the plot."""
    console = _console(terminal)
    native, whole = summarise(result.native), summarise(result.envelope)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("multiple", "base", "peaks", "troughs", "deepest trough", "at distance", "mean"):
        table.add_column(column, justify="left" if column == "multiple" else "right")
    if result.native_base not in result.bases:
        table.add_row(*_cells("native, unused", result.native_base, native), style="dim")
    for name, base, wave in zip(wave_names(result), result.bases, result.waves, strict=True):
        table.add_row(*_cells(name, base, summarise(wave)))
    table.add_row(*_cells("envelope", None, whole), style="bold")
    name = printable(result.header.path.name)
    head = f"{name}: {result.pairs} pairs, native base {result.native_base:,g}, {result.context:,} tokens"
    console.print(Text(f"{head}\nwaves in % of their value at distance 0"), soft_wrap=True)
    console.print(table)
    console.print(
        Text(
            f"deepest trough: {native.lowest:.1%} (native base alone) -> "
            f"{whole.lowest:.1%} ({len(result.bases)} bucket{'s' if len(result.bases) > 1 else ''})"
        )
    )
    if result.search is not None:
        listed = ",".join(f"{base / result.native_base:.9g}" for base in result.bases)
        console.print(Text(f"found by {result.search.objective}; use it with: --multipliers {listed}"), soft_wrap=True)
    if plot:
        lines = ["", *wave_plot(result, console.width, unicode=_unicode(terminal))]
        console.print(Text("\n".join(lines)), soft_wrap=True)


def _cells(name: str, base: float | None, summary: WaveSummary) -> tuple[str, ...]:
    return (
        name,
        "" if base is None else f"{base:,.0f}",
        str(len(summary.peaks)),
        str(len(summary.troughs)),
        f"{summary.lowest:.1%}",
        f"{summary.lowest_at:,}",
        f"{summary.mean:.1%}",
    )


def _report(result: Waves) -> dict[str, Any]:
    """The object that --json prints."""
    native, whole = summarise(result.native), summarise(result.envelope)
    buckets = [
        {"base": base, "multiplier": base / result.native_base, **asdict(summarise(wave))}
        for base, wave in zip(result.bases, result.waves, strict=True)
    ]
    return {
        "model": str(result.header.path),
        "native_base": result.native_base,
        "context": result.context,
        "pairs": result.pairs,
        "value_at_zero": value_at_zero(result.pairs),
        "extrema_radius": EXTREMA_RADIUS,
        "search": None if result.search is None else asdict(result.search),
        "native": asdict(native),
        "buckets": buckets,
        "envelope": asdict(whole),
        "deepest_trough": {"before": native.lowest, "after": whole.lowest},
    }
