"""A batch before the model is loaded: what is asked of which model, and what its results depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import randbelow
from typing import Any

from abcli.batch.cluster.pool import WorkerSetup
from abcli.batch.jobs import BadLine, Job
from abcli.batch.progress import RunProgress, left_to_do
from abcli.batch.reading import (
    InputParts,
    JobReader,
    can_be_read_again,
    count_jobs,
    in_shard,
    input_digest,
    input_file,
)
from abcli.batch.shapes import OutputFormat
from abcli.batch.sidecar import describe_generation
from abcli.batch.writing import Output, open_output
from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.options import ChatOptions, option_fields
from abcli.chat.template import template_source
from abcli.hub.locate import portable_name
from abcli.prepare import Prepared
from abcli.sampling import NATIVE_RANDOM_SEED, GenerationConfig


@dataclass(frozen=True)
class Task:
    """Everything that is known before the model is loaded; `chat_template` is a name or a file, None for its own."""

    source: Path
    parts: InputParts
    generation: GenerationConfig
    found: Prepared
    chat_template: str | None
    options: ChatOptions = field(default_factory=ChatOptions)
    """What the template is told beside the messages; lines may say otherwise."""
    on_remark: Callable[[str], None] | None = None
    """Gets, once each, what is not enforced of the lines' schemas."""

    def count(self) -> int | None:
        """The number of lines of the whole input, None if it cannot be known beforehand."""
        return count_jobs(self.source, self.parts)

    def open_ends(
        self, stack: ExitStack, destination: Path, format: OutputFormat | None, *, ordered: bool, restart: bool
    ) -> tuple[Output, JobReader]:
        """The output, bound to the task, and the input under the output's seed; both are left to `stack`.

        Without a `format` results are written as the input suggests. An output that is there already is continued,
        unless `restart`. Raises UsageError, PromptError and BatchError.
        """
        seed = self.generation.sampling.seed
        again = can_be_read_again(self.source)
        if not again and seed < 0:
            seed = randbelow(NATIVE_RANDOM_SEED)
        reader = stack.enter_context(self._read(seed))
        output = open_output(
            destination,
            self._settings(),
            input_digest=input_digest(self.source),
            format=format or ("openai" if reader.format == "openai" else "jsonl"),
            ordered=ordered,
            separator=self.parts.separator,
            shard=self.parts.shard,
            seed=seed,
            model=self.found.model.name,
            restart=restart,
            source=input_file(self.source),
        )
        stack.enter_context(output)
        if again and output.seed != seed:
            reader = stack.enter_context(self._read(output.seed))
        return output, reader

    def left(self, reader: JobReader, output: Output, progress: RunProgress) -> Iterator[Job | BadLine]:
        """What of the input is this shard's and not done."""
        own: Iterable[Job | BadLine] = (item for item in reader if in_shard(item.index, self.parts.shard))
        return left_to_do(own, output.is_done, progress)

    def worker_setup(self, model: str | None, slots: int | None) -> WorkerSetup:
        """What a worker on another machine is to open for the same results; `model` is its name as the user gave it."""
        context, config = self.found.context, self.found.model.config
        # What each worker measured for itself would let a line's last digits depend on who answers it.
        several = len(self.found.buckets.bases) > 1
        engine = "contexts" if several and context.engine == "auto" else context.engine
        choice = self.chat_template
        return WorkerSetup(
            model=portable_name(model),
            fingerprint=self.found.model.fingerprint,
            gpu_layers=config.gpu_layers,
            lora=tuple(replace(lora, path=lora.path.absolute()) for lora in config.lora),
            context=replace(context, engine=engine),
            buckets=self.found.buckets,
            template=template_source(choice) if choice is not None else None,
            slots=slots,
            tuning=self.found.model.tuning,
        )

    def _read(self, seed: int) -> JobReader:
        """The input from its beginning, under the run's seed."""
        sampling = replace(self.generation.sampling, seed=seed)
        return JobReader(
            self.source,
            self.parts,
            replace(self.generation, sampling=sampling),
            vocabulary_size=self.found.model.header.vocabulary_size,
            options=self.options,
            on_remark=self.on_remark,
        )

    def _settings(self) -> dict[str, Any]:
        """What the results depend on, apart from the input's bytes and the seed."""
        generation = describe_generation(self.generation)
        del generation["seed"]
        context, buckets, parts = self.found.context, self.found.buckets, self.parts
        return {
            "model": self.found.model.fingerprint,
            "bases": list(buckets.bases),
            "merge": buckets.merge,
            "weights": list(buckets.weights),
            "prefill": context.prefill,
            "prefill_base": buckets.prefill_base,
            "ctx_size": context.context_size,
            "cache_type_k": context.cache_type_k,
            "cache_type_v": context.cache_type_v,
            "chat_template": _template_name(self.chat_template),
            "format": parts.format,
            "separator": parts.separator,
            "template": list(parts.template.parts) if parts.template is not None else None,
            "context": _digest(parts.context.encode()) if parts.context else None,
            "system": parts.system,
            **generation,
            **option_fields(self.options),
        }


def _template_name(choice: str | None) -> str | None:
    """What stands for a chat template: the name of a known one, else the digest of the file."""
    if choice is None or choice in KNOWN_TEMPLATES or not Path(choice).is_file():
        return choice
    return _digest(Path(choice).read_bytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
