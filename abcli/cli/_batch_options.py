"""The flags of `abcli batch` that say what the prompts are made of and where the answers go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from abcli.batch.reading import InputParts, parse_shard
from abcli.batch.shapes import OutputFormat
from abcli.batch.templates import parse_template
from abcli.chat.files import read_text_file
from abcli.cli._flags import flag
from abcli.cli._options import check_argument
from abcli.errors import UsageError


@dataclass(frozen=True)
class InputOptions:
    """What the prompts are made of."""

    panel: ClassVar[str] = "Input"

    format: Annotated[
        Literal["auto", "text", "jsonl", "openai", "csv"], flag("How the input is written.", "--format")
    ] = "auto"
    separator: Annotated[
        str | None,
        flag("Line between prompts of several lines, and between answers with --output-format text.", "--separator"),
    ] = None
    template: Annotated[
        Path | None, flag("File with {{field}}s, filled in from each row or JSON object.", "--template")
    ] = None
    context: Annotated[Path | None, flag("File whose text comes before every prompt.", "--context")] = None
    system: Annotated[str | None, flag("System prompt of those without one.", "--system", "-sys")] = None
    shard: Annotated[str | None, flag("Do part I of N of the input.", "--shard", metavar="I/N")] = None

    def parts(self, read: Callable[[str, str], str]) -> InputParts:
        """The same with the files read; `read` is AnswerOptions.text. Raises UsageError and PromptError."""
        return InputParts(
            format=self.format,
            separator=check_argument(self.separator, "--separator") if self.separator is not None else None,
            template=parse_template(read_text_file(self.template)) if self.template is not None else None,
            context=read_text_file(self.context) if self.context is not None else "",
            system=read(self.system, "--system") if self.system is not None else None,
            shard=parse_shard(self.shard) if self.shard is not None else None,
        )


@dataclass(frozen=True)
class OutputOptions:
    """Where the answers go, and how."""

    panel: ClassVar[str] = "Output"

    output: Annotated[
        Path | None, flag("File for the results, - for standard output; .gz and .zst compress.", "--output", "-o")
    ] = None
    output_format: Annotated[
        OutputFormat | None,
        flag("How results are written.", "--output-format", show_default="openai if the input is, else jsonl"),
    ] = None
    ordered: Annotated[bool, flag("In the order of the input, not as they are done.", "--ordered")] = False
    restart: Annotated[bool, flag("Begin anew, and drop what an earlier run has done.", "--restart")] = False
    fail_fast: Annotated[bool, flag("Stop at the first prompt that fails.", "--fail-fast")] = False
    summary: Annotated[Path | None, flag("Write what was done to this file, as JSON.", "--summary")] = None
    slots: Annotated[
        str, flag("Prompts decoded together: a number, or auto: as many as are of use and fit into memory.", "--slots")
    ] = "auto"

    def check(self) -> Path:
        """The output. Raises UsageError for what would only be noticed after the work is done."""
        if self.output is None:
            raise UsageError("there is no output", "give -o FILE, or -o - for standard output")
        if self.summary is not None and (self.summary.is_dir() or not self.summary.parent.is_dir()):
            raise UsageError(f"--summary {self.summary} cannot be written", "name a file in a directory that exists")
        if self.summary is not None and self.summary.absolute() == self.output.absolute():
            raise UsageError(f"{self.summary} is both --summary and --output", "give them different names")
        return self.output

    def wanted_slots(self) -> int | None:
        """The number of slots that is asked for, None for auto. Raises UsageError."""
        if self.slots == "auto":
            return None
        if not (self.slots.isascii() and self.slots.isdecimal() and len(self.slots) < 10):
            raise UsageError(f"--slots {self.slots!r:.80} is impossible", "give a number, or auto")
        return int(self.slots)


@dataclass(frozen=True)
class ClusterOptions:
    """Who answers, if not this process alone."""

    panel: ClassVar[str] = "More than one machine"

    ray: Annotated[
        bool,
        flag(
            "Split the input over a Ray cluster: --ray=HOST:PORT, $RAY_ADDRESS, or a new one on this machine.", "--ray"
        ),
    ] = False
    ray_address: Annotated[
        str | None, flag("The cluster's address; implies --ray.", "--ray-address", metavar="HOST:PORT")
    ] = None
    ray_workers: Annotated[
        int | None, flag("Workers, each with a model of its own.", "--ray-workers", show_default="one on every machine")
    ] = None

    def wanted(self) -> bool:
        """Whether a cluster is to be used. Raises UsageError for what makes no sense."""
        wanted = self.ray or self.ray_address is not None
        if self.ray_workers is not None:
            if not wanted:
                raise UsageError(f"--ray-workers {self.ray_workers} is of no use without --ray", "add --ray")
            if self.ray_workers < 1:
                raise UsageError(f"--ray-workers {self.ray_workers} is impossible", "choose 1 or more")
        return wanted
