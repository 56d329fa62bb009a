"""`abcli bench`: how fast a model decodes with 1 to N buckets here, beside llama.cpp's own limits."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer
from rich.console import Console

from abcli.bench.load import OtherLoad
from abcli.bench.measure import Findings, benchmark
from abcli.bench.plan import BenchSettings, EngineKind, PromptPhase
from abcli.bench.report import BenchReport, Circumstances, as_json, make_report
from abcli.bench.workshop import ModelWorkshop, open_workshop
from abcli.cli._figures import FigureOptions
from abcli.cli._flags import flag
from abcli.cli._options import ModelOptions
from abcli.config import DEFAULT_CONTEXT, MAX_BUCKETS, MAX_CONTEXT, ContextConfig, EngineChoice, PrefillMode
from abcli.errors import AbcliError, CancelledError, UsageError
from abcli.gguf.checked import CheckedModel, check_model
from abcli.machine import available_cores, devices, log_to, version
from abcli.text import StageProgress
from abcli.ui.bench import plan_text, show_bench, speed_figure
from abcli.ui.plots import speed_image
from abcli.ui.progress import stage_progress
from abcli.ui.report_pages import bench_page
from abcli.ui.terminal import Terminal, on_interrupt

_USUAL = BenchSettings()
_MAX_TOKENS = 2**20
_MAX_ROUNDS = 10_000
# Where no terminal sets a limit, no line of a table is folded.
_PLAIN_WIDTH = 250


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often."""

    panel: ClassVar[str] = "Benchmark"

    buckets: Annotated[
        str,
        flag(
            f"Numbers of buckets, 1 to {MAX_BUCKETS}: 6, 1,2,4,6 or 1-6; 1 is always among them.",
            "--buckets",
            "-k",
            metavar="LIST",
        ),
    ] = ",".join(map(str, _USUAL.buckets))
    n_prompt: Annotated[int, flag("Tokens of prompt to read; 0: none.", "--n-prompt", "-p")] = _USUAL.prompt_tokens
    n_gen: Annotated[int, flag("Tokens to decode in each round; 0: none.", "--n-gen", "-n")] = _USUAL.new_tokens
    rounds: Annotated[
        int,
        flag("Rounds of decoding; prompts are read in half as many, exact ones in a quarter.", "--rounds", "-r"),
    ] = _USUAL.rounds
    memory: Annotated[bool, flag("Measure the memory of each engine.", "--memory/--no-memory")] = _USUAL.memory
    remeasure: Annotated[
        bool, flag("Let --engine auto decide anew from this measurement, not from a remembered one.", "--remeasure")
    ] = False
    as_json: Annotated[bool, flag("Print one JSON object instead of tables.", "--json")] = False

    def settings(self, engine: EngineChoice, prompts: PrefillMode | None, context_size: int) -> BenchSettings:
        """The settings that the flags ask for. Raises UsageError."""
        for name, value, least, most in (
            ("--n-prompt", self.n_prompt, 0, _MAX_TOKENS),
            ("--n-gen", self.n_gen, 0, _MAX_TOKENS),
            ("--rounds", self.rounds, 1, _MAX_ROUNDS),
            ("--ctx-size", context_size, 3, MAX_CONTEXT),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} {value} is impossible", f"choose {least} to {most}")
        if self.n_prompt == 1:
            raise UsageError("--n-prompt 1 is impossible", "a prompt to share has 2 tokens or more; 0: none")
        if self.n_prompt == self.n_gen == 0:
            raise UsageError("nothing is left to measure", "ask for a prompt (--n-prompt) or for tokens (--n-gen)")
        engines: tuple[EngineKind, ...] = _USUAL.engines if engine == "auto" else (engine,)
        wanted: tuple[PromptPhase, ...] = _USUAL.prompts
        if prompts is not None and prompts != "auto":
            wanted = (prompts,)
        return BenchSettings(
            buckets=parse_counts(self.buckets),
            engines=engines,
            prompts=wanted,
            prompt_tokens=self.n_prompt,
            new_tokens=self.n_gen,
            rounds=self.rounds,
            memory=self.memory,
            context_size=context_size,
        )


@dataclass(frozen=True)
class BenchModelOptions(ModelOptions):
    """The model, and how llama.cpp runs it; some flags mean what to measure."""

    ctx_size: Annotated[
        int, flag("Tokens of the context whose memory is measured; 0: the trained length.", "--ctx-size", "-c")
    ] = DEFAULT_CONTEXT
    prefill: Annotated[
        PrefillMode | None, flag("Read prompts one way only; auto: both.", "--prefill", show_default="auto")
    ] = None
    engine: Annotated[EngineChoice, flag("Measure one engine only; auto: both.", "--engine")] = "auto"

    def check(self) -> None:
        """Raise UsageError for flags that have no say in a benchmark."""
        for name, given in (
            ("--prefill-base", self.prefill_base is not None),
            ("--prompt-cache", self.prompt_cache or self.prompt_cache_dir is not None),
            ("--chat-template", self.chat_template is not None),
        ):
            if given:
                raise UsageError(f"{name} has no say in a benchmark", "drop it")


def bench(
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    bench_options: BenchOptions,
    figure_options: FigureOptions,
    model_options: BenchModelOptions,
) -> None:
    """Measure both engines side by side, and show tables, JSON or a figure."""
    figure_options.check()
    model_options.check()
    # What is wrong with the flags is said before a model is fetched.
    bench_options.settings(model_options.engine, model_options.prefill, model_options.ctx_size or DEFAULT_CONTEXT)
    terminal = Terminal()
    model, config = check_model(model_options.model_config(model_word)), model_options.context_config()
    context_size = model_options.ctx_size or model.header.trained_context
    settings = bench_options.settings(model_options.engine, model_options.prefill, context_size)
    if model_options.verbose:
        log_to(sys.stderr.write)
    terminal.note(plan_text(settings, config.threads or available_cores()))
    report, failure = _measure(terminal, model, config, settings, remeasure=bench_options.remeasure)
    if report is not None and report.rows:
        figure_options.write(
            lambda image_format: speed_image(speed_figure(report), image_format), lambda: bench_page(report)
        )
        if bench_options.as_json:
            terminal.write(json.dumps(as_json(report), ensure_ascii=False) + "\n")
        else:
            width = None if terminal.output_is_terminal else _PLAIN_WIDTH
            show_bench(Console(file=terminal.output, highlight=False, emoji=False, width=width), report)
    if failure is not None:
        raise failure


def parse_counts(text: str) -> tuple[int, ...]:
    """The numbers of buckets of a list such as "6", "1,2,4,6" or "1-4,6", ascending and with 1. Raises UsageError."""
    counts = {1}
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdecimal() and len(end) <= 4 for end in ends):
            raise UsageError(
                f"--buckets: {item.strip()!r:.40} is no number of buckets", "write it like 6, 1,2,4 or 1-6"
            )
        low, high = map(int, ends)
        if not 1 <= low <= high <= MAX_BUCKETS:
            raise UsageError(f"--buckets {item.strip()} is impossible", f"choose 1 to {MAX_BUCKETS}")
        counts.update(range(low, high + 1))
    return tuple(sorted(counts))


def _measure(
    terminal: Terminal, model: CheckedModel, config: ContextConfig, settings: BenchSettings, *, remeasure: bool
) -> tuple[BenchReport | None, AbcliError | None]:
    """What was measured, and what ended the measurement before its end, if anything."""
    findings = Findings()
    report: BenchReport | None = None
    failure: AbcliError | None = None
    with open_workshop(model, config, settings) as workshop:
        if remeasure:
            workshop.forget_choices()
        stop, load = _Stop(), OtherLoad()
        try:
            with stage_progress(terminal) as progress, on_interrupt(stop.press):
                benchmark(settings, workshop, findings, stop.checked(progress))
        except KeyboardInterrupt:
            failure = CancelledError()
        except AbcliError as error:
            failure = error
        findings.other_cores = load.cores()
        report = make_report(settings, _circumstances(workshop, config), findings, workshop.bases)
    return report, failure


class _Stop:
    """Ctrl-C as KeyboardInterrupt, a second time at the next turn if a callback of llama.cpp swallowed the first."""

    def __init__(self) -> None:
        self._pressed = False

    def press(self) -> None:
        self._pressed = True
        raise KeyboardInterrupt

    def checked(self, progress: StageProgress) -> StageProgress:
        def checked(what: str, done: int, total: int) -> None:
            if self._pressed:
                raise KeyboardInterrupt
            progress(what, done, total)

        return checked


def _circumstances(workshop: ModelWorkshop, config: ContextConfig) -> Circumstances:
    return Circumstances(
        model=workshop.model.path.name,
        description=workshop.model.description,
        fingerprint=workshop.model.checked.fingerprint,
        llama_cpp=version(),
        devices=tuple((device.name, device.description) for device in devices()),
        threads=config.threads or available_cores(),
        gpu_layers=workshop.model.checked.config.gpu_layers,
        config=config,
    )
