"""`abcli batch`: answers a file of prompts, and puts the outputs of its shards together."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import randbelow
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from abcli.atomic import write_atomically
from abcli.batch.cluster.pool import WorkerSetup
from abcli.batch.jobs import BadLine, Job
from abcli.batch.merging import merge_outputs
from abcli.batch.progress import Progress, Stopwatch, Summary, left_to_do, shard_size, summarise
from abcli.batch.reading import (
    JobReader,
    can_be_read_again,
    count_jobs,
    in_shard,
    input_digest,
    input_file,
    read_jobs,
)
from abcli.batch.scheduler import Totals
from abcli.batch.sidecar import describe_generation
from abcli.batch.slots import plan_slots
from abcli.batch.writing import Output, open_output
from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.template import template_source
from abcli.cli.batch_answering import Run
from abcli.cli.batch_options import ClusterOptions, InputOptions, InputParts, OutputOptions
from abcli.cli.flags import with_options
from abcli.cli.options import AnswerOptions, ModelOptions, ProfiledBucketOptions, SamplingOptions
from abcli.cli.setup import resolve_profile
from abcli.config import NATIVE_RANDOM_SEED, BucketConfig, EngineConfig, GenerationConfig
from abcli.errors import BatchError, CancelledError, UsageError
from abcli.gguf.fingerprint import fingerprint
from abcli.gguf.header import Header
from abcli.gguf.lora import check_model
from abcli.hub.locate import portable_name
from abcli.rope.bases import choose_bases
from abcli.ui.batch import summary_text
from abcli.ui.terminal import Terminal


class _RunByDefault(TyperGroup):
    """A group whose command `run` needs no name: `abcli batch FILE` is `abcli batch run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


app = typer.Typer(cls=_RunByDefault, add_completion=False)


@dataclass(frozen=True)
class _Task:
    """Everything that is known before the model is loaded."""

    source: Path
    parts: InputParts
    generation: GenerationConfig
    config: EngineConfig
    buckets: BucketConfig
    header: Header

    def read(self, seed: int) -> JobReader:
        """The input from its beginning, under the run's seed."""
        sampling = replace(self.generation.sampling, seed=seed)
        return read_jobs(
            self.source,
            self.parts.format,
            replace(self.generation, sampling=sampling),
            separator=self.parts.separator,
            template=self.parts.template,
            context=self.parts.context,
            system=self.parts.system,
            vocabulary_size=self.header.vocabulary_size,
        )

    def settings(self, chat_template: str | None) -> dict[str, Any]:
        """What the results depend on, apart from the input's bytes and the seed."""
        generation = describe_generation(self.generation)
        del generation["seed"]
        engine = self.config
        return {
            "model": fingerprint(self.header),
            "bases": list(engine.bases),
            "merge": self.buckets.merge,
            "weights": list(self.buckets.weights),
            "prefill": engine.prefill,
            "prefill_base": engine.prefill_base,
            "ctx_size": engine.context_size,
            "cache_type_k": engine.cache_type_k,
            "cache_type_v": engine.cache_type_v,
            "chat_template": _template_name(chat_template),
            "format": self.parts.format,
            "separator": self.parts.separator,
            "template": list(self.parts.template.parts) if self.parts.template is not None else None,
            "context": _digest(self.parts.context.encode()) if self.parts.context else None,
            "system": self.parts.system,
            **generation,
        }

    def worker_setup(self, positional: str | None, options: ModelOptions, slots: int | None) -> WorkerSetup:
        """What a worker on another machine is to open for the same results."""
        choice = options.chat_template
        # What each worker measured for itself would let a line's last digits depend on who answers it.
        several = len(self.config.bases) > 1
        engine = "contexts" if several and self.config.engine == "auto" else self.config.engine
        return WorkerSetup(
            model=portable_name(positional or options.model),
            fingerprint=fingerprint(self.header),
            config=replace(
                self.config,
                engine=engine,
                lora=tuple(replace(lora, path=lora.path.absolute()) for lora in self.config.lora),
            ),
            buckets=self.buckets,
            template=template_source(choice) if choice is not None else None,
            slots=slots,
        )


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
) -> None:
    """Answer every prompt of a file: parse, bind the output to the settings, load, run, report."""
    destination = output_options.check()
    wanted = output_options.wanted_slots()
    on_cluster = cluster_options.wanted()
    model, source = _split_words(words or [])
    terminal = Terminal()
    if model_options.prompt_cache or model_options.prompt_cache_dir is not None:
        raise UsageError("--prompt-cache has no say in a batch", "prompts that share a beginning share it in memory")
    generation = answer_options.config(sampling_options.config())
    source_parts = input_options.parts(answer_options.text)
    config, buckets = resolve_profile(terminal, model, model_options, bucket_options)
    header = check_model(config.model, config.lora)
    config = replace(
        config,
        bases=choose_bases(buckets, header.native_base),
        context_size=config.context_size or header.trained_context,
    )
    task = _Task(Path(source), source_parts, generation, config, buckets, header)
    lines = shard_size(_count(task), source_parts.shard)
    # Each worker of a cluster plans its own slots.
    plan = None if on_cluster else plan_slots(wanted, config, header, lines)
    watch, totals = Stopwatch(), Totals()
    with ExitStack() as stack:
        output, reader = _open_ends(stack, task, destination, output_options, model_options.chat_template)
        progress = Progress(lines)
        if output.resumed:
            terminal.note(f"continuing {destination}, which has {len(output.done):,} results")
        items = _own_items(reader, output, task.parts.shard, progress)
        if output.complete:
            ending = "finished" if all(False for _ in items) else "interrupted"
        else:
            bar = not (_is_standard(destination) and terminal.output_is_terminal)
            run = Run(items, output, progress, totals, terminal, bar, output_options.fail_fast)
            if plan is None:
                ending = run.answer_on_cluster(task.worker_setup(model, model_options, wanted), cluster_options)
            else:
                terminal.note(plan.text(config.context_size, len(config.bases)))
                own = replace(config, slots=plan.slots)
                ending = run.answer_here(own, buckets, model_options.chat_template, verbose=model_options.verbose)
            if ending == "finished":
                output.finish()
    summary = summarise(progress, totals, watch.seconds, finished=ending == "finished")
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


def _open_ends(
    stack: ExitStack, task: _Task, destination: Path, options: OutputOptions, chat_template: str | None
) -> tuple[Output, JobReader]:
    """The output, bound to the task, and the input under the output's seed; both are left to `stack`."""
    seed = task.generation.sampling.seed
    again = can_be_read_again(task.source)
    if not again and seed < 0:
        seed = randbelow(NATIVE_RANDOM_SEED)
    reader = stack.enter_context(task.read(seed))
    output = open_output(
        destination,
        task.settings(chat_template),
        input_digest=input_digest(task.source),
        format=options.output_format or ("openai" if reader.format == "openai" else "jsonl"),
        ordered=options.ordered,
        separator=task.parts.separator,
        shard=task.parts.shard,
        seed=seed,
        model=task.header.name,
        restart=options.restart,
        source=input_file(task.source),
    )
    stack.enter_context(output)
    if again and output.seed != seed:
        reader = stack.enter_context(task.read(output.seed))
    return output, reader


def _own_items(
    reader: JobReader, output: Output, shard: tuple[int, int] | None, progress: Progress
) -> Iterator[Job | BadLine]:
    """What of the input is this shard's and not done."""
    own: Iterable[Job | BadLine] = (item for item in reader if in_shard(item.index, shard))
    return left_to_do(own, output.is_done, progress)


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


def _count(task: _Task) -> int | None:
    return count_jobs(task.source, task.parts.format, separator=task.parts.separator, template=task.parts.template)


def _is_standard(path: Path) -> bool:
    return str(path) == "-"


def _template_name(choice: str | None) -> str | None:
    """What stands for --chat-template: the name of a known one, else the digest of the file."""
    if choice is None or choice in KNOWN_TEMPLATES or not Path(choice).is_file():
        return choice
    return _digest(Path(choice).read_bytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
