"""`abcli batch`: answers a file of prompts, and puts the outputs of its shards together."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from abcli.atomic import write_atomically
from abcli.batch.answering import Ending, Run
from abcli.batch.cluster.pool import WorkerSetup
from abcli.batch.cluster.ray_pool import RayPool
from abcli.batch.merging import merge_outputs
from abcli.batch.progress import RunProgress, Stopwatch, Summary, shard_size, summarise
from abcli.batch.reading import can_be_read_again
from abcli.batch.scheduler import StopSwitch, Totals
from abcli.batch.slots import SlotPlan, plan_slots
from abcli.batch.task import Task
from abcli.cli._batch_options import ClusterOptions, InputOptions, OutputOptions
from abcli.cli._chat_options import ChatFlags
from abcli.cli._flags import with_options
from abcli.cli._options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions
from abcli.cli._setup import opened, prepared
from abcli.errors import BatchError, CancelledError, UsageError
from abcli.grammar.check import check
from abcli.prepare import Prepared
from abcli.ui.batch import batch_progress, summary_text
from abcli.ui.terminal import Terminal, on_interrupt


class _RunByDefault(TyperGroup):
    """A group whose command `run` needs no name: `abcli batch FILE` is `abcli batch run FILE`."""

    default_command = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else [self.default_command, *args])


app = typer.Typer(cls=_RunByDefault, add_completion=False)


def batch(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] INPUT", help="GGUF file (default: the default model) and file of prompts."),
    ] = None,
    *,
    input_options: InputOptions,
    output_options: OutputOptions,
    cluster_options: ClusterOptions,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling_options: SamplingOptions,
    answer_options: AnswerOptions,
    chat_flags: ChatFlags,
) -> None:
    """Answer every prompt of a file: parse, bind the output to the settings, load, run, report."""
    destination = output_options.check()
    wanted = output_options.wanted_slots()
    on_cluster = cluster_options.wanted()
    model, source = _split_words(words or [])
    terminal = Terminal()
    _refuse_prompt_cache(model_options)
    generation = answer_options.config(sampling_options.config(), bucket_options.threshold())
    check(generation.sampling)
    options = chat_flags.options()
    parts = input_options.parts(answer_options.text)
    found = prepared(terminal, model, model_options, bucket_options)
    task = Task(Path(source), parts, generation, found, model_options.chat_template, options, terminal.warn)
    lines = shard_size(task.count(), parts.shard)
    answer: Callable[[Run], Ending]
    if on_cluster:
        # Each worker plans its own slots.
        setup = task.worker_setup(model or model_options.model, wanted)
        answer = partial(_answer_on_cluster, terminal, setup, cluster_options)
    else:
        answer = partial(_answer_here, terminal, plan_slots(wanted, found, lines), found, model_options)
    stopwatch, totals = Stopwatch(), Totals()
    with ExitStack() as stack:
        how = {"ordered": output_options.ordered, "restart": output_options.restart}
        output, reader = task.open_ends(stack, destination, output_options.output_format, **how)
        progress = RunProgress(lines)
        if output.resumed:
            terminal.note(f"continuing {destination}, which has {len(output.done):,} results")
        items = task.left(reader, output, progress)
        if output.complete:
            ending = "finished" if all(False for _ in items) else "interrupted"
        else:
            bar = not (_is_standard(destination) and terminal.output_is_terminal)
            watch = partial(_watch, terminal, progress, totals, bar)
            ending = answer(Run(items, output, progress, totals, output_options.fail_fast, watch))
            if ending == "finished":
                output.finish()
    summary = summarise(progress, totals, stopwatch.seconds, finished=ending == "finished")
    _report(terminal, summary, output_options.summary)
    if ending == "interrupted":
        raise _interrupted(terminal, summary, task.source, destination)
    if summary.errors or summary.skipped_errors:
        raise typer.Exit(1)


def merge(
    outputs: Annotated[list[Path], typer.Argument(metavar="OUTPUT...", help="The outputs of all shards.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for all results, in the input's order.")],
    restart: Annotated[bool, typer.Option("--restart", help="Replace a file that is there.")] = False,
) -> None:
    """Put the outputs of the shards of one batch together."""
    count = merge_outputs(outputs, output, restart=restart)
    Terminal().note(f"{count:,} results in {output}")


app.command("run", help="Answer the prompts in a file (the word `run` may be left out).")(with_options(batch))
app.command("merge", help="Put the outputs of the shards of one batch together.")(merge)


def _split_words(words: list[str]) -> tuple[str | None, str]:
    """The model, if it is given, and the input. Raises UsageError."""
    if len(words) not in (1, 2):
        wrong = "there is no input" if not words else f"{len(words)} words are given, but MODEL and INPUT are two"
        raise UsageError(wrong, "name a file of prompts, or - for standard input")
    return (words[0] if len(words) == 2 else None), words[-1]


def _refuse_prompt_cache(options: ModelOptions) -> None:
    if options.prompt_cache or options.prompt_cache_dir is not None:
        raise UsageError("--prompt-cache has no say in a batch", "prompts that share a beginning share it in memory")


def _answer_here(terminal: Terminal, plan: SlotPlan, found: Prepared, options: ModelOptions, run: Run) -> Ending:
    """Load the model, and let it answer."""
    terminal.note(plan.text(found.context.context_size, len(found.buckets.bases)))
    own = replace(found, context=replace(found.context, slots=plan.slots))
    with opened(terminal, own, options) as llm:
        return run.answer_here(llm)


def _answer_on_cluster(terminal: Terminal, setup: WorkerSetup, options: ClusterOptions, run: Run) -> Ending:
    """Join the cluster, and let its workers answer."""
    with terminal.working("joining the cluster"):
        pool = RayPool(setup, options.ray_address, options.ray_workers)
    with pool:
        return run.answer_on_cluster(pool, terminal.note, terminal.warn)


@contextmanager
def _watch(
    terminal: Terminal, progress: RunProgress, totals: Totals, bar: bool, switch: StopSwitch
) -> Iterator[Callable[[], None]]:
    """A bar, and Ctrl-C as the switch, while a batch runs."""
    with on_interrupt(switch.press), batch_progress(terminal, progress, totals, switch, bar=bar) as show:
        yield show


def _report(terminal: Terminal, summary: Summary, path: Path | None) -> None:
    """The summary on standard error, and in a file if one is named."""
    terminal.note(summary_text(summary))
    if path is None:
        return
    try:
        write_atomically(path, (json.dumps(summary.report(), indent=2) + "\n").encode())
    except OSError as error:
        raise BatchError(f"cannot write {path}: {error.strerror}", "the results themselves are written") from error


def _interrupted(terminal: Terminal, summary: Summary, source: Path, destination: Path) -> CancelledError:
    """The error of a run that was interrupted, after the command that continues it has been shown."""
    done = f"interrupted after {summary.skipped + summary.written:,} lines"
    if _is_standard(destination) or not can_be_read_again(source):
        return CancelledError(done, "a run on standard input or output cannot be continued")
    words = [os.fsencode(word).decode("utf-8", "replace") for word in sys.argv[1:] if word != "--restart"]
    terminal.note(f"to continue: abcli {shlex.join(words)}")
    return CancelledError(done, "the same command continues, without --restart")


def _is_standard(path: Path) -> bool:
    return str(path) == "-"
