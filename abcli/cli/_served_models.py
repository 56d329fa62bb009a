"""The models of `abcli serve`: which ones, under which names, and how each is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from abcli.batch.slots import plan_slots
from abcli.cli._flags import flag
from abcli.cli._options import ProfiledBucketOptions, RunningOptions, check_argument
from abcli.cli._setup import opened, prepared_model
from abcli.config import ModelConfig, Pooling
from abcli.embedder import Embedder, makes_embeddings
from abcli.errors import AbcliError, TemplateError, UsageError
from abcli.gguf.check import check_kind_of_model, is_embedding_model
from abcli.gguf.header import read_header
from abcli.hub.aliases import aliases
from abcli.hub.listing import listed_models
from abcli.hub.names import hub_word
from abcli.llm import LLM
from abcli.sampling import check_sampling
from abcli.text import counted, gibibytes
from abcli.ui.terminal import Terminal

if TYPE_CHECKING:
    # An extra may be missing.
    from abcli.serve.service import Served, Settings

_MOST_AUTOMATIC = 4


@dataclass(frozen=True)
class ServedModelOptions:
    """Which models, and how many of them at once."""

    panel: ClassVar[str] = "Model"

    model: Annotated[
        list[str] | None,
        flag("GGUF file, user/repository[:quant], alias or known name; repeatable.", "--model", "-m"),
    ] = None
    hf_repo: Annotated[
        list[str] | None,
        flag(
            "Model of the hub, whatever else has its name; repeatable.",
            "--hf-repo",
            "-hf",
            metavar="USER/REPOSITORY[:QUANT]",
        ),
    ] = None
    alias: Annotated[
        list[str] | None,
        flag("Name of the model for clients; one for each.", "--alias", "-a", show_default="the file's name"),
    ] = None
    models_max: Annotated[
        int | None,
        flag(
            "Most models loaded at once; others are loaded when they are asked for, in the place of the one used "
            "least recently. Where none is named, all that `abcli models` lists can be asked.",
            "--models-max",
            min=1,
            show_default="all that are named",
        ),
    ] = None
    pooling: Annotated[
        Pooling | None,
        flag(
            "Serve embeddings, whatever the models are for, pooled like this.",
            "--pooling",
            show_default="as an embedding model's file says",
        ),
    ] = None

    def names(self, positional: Sequence[str]) -> list[str]:
        """All models that are named, `positional` ones without a flag."""
        return [*positional, *(self.model or ()), *map(hub_word, self.hf_repo or ())]

    def found(self, named: Sequence[str], running: RunningOptions) -> dict[str, ModelConfig]:
        """The models of these names, by their names for clients; those of the hub that are not here are fetched.

        Raises UsageError for names that are no names or two alike, and what `RunningOptions.config_of` raises.
        """
        if not named and self.models_max is not None:
            if self.alias:
                raise UsageError("--alias is given, but no model", "name the models, or leave it out")
            return self._listed(running)
        configs = [running.config_of(name) for name in named or (None,)]
        names = [check_argument(name, "--alias") for name in self.alias or ()]
        if len(names) > len(configs) or not all(names):
            raise UsageError(
                f"--alias is given {counted(len(names), 'time')} for {counted(len(configs), 'model')}",
                "give each model at most one, and none that is empty",
            )
        names += [config.path.stem for config in configs[len(names) :]]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"two models are called {twice}", "name them with --alias, once for each, in their order")
        return dict(zip(names, configs, strict=True))

    def _listed(self, running: RunningOptions) -> dict[str, ModelConfig]:
        """The models on this machine; of two that would have one name the first."""
        found: dict[str, ModelConfig] = {}
        for listed in listed_models(aliases()):
            path = listed.files[0]
            try:
                header = read_header(path)
                check_kind_of_model(header, embeds=is_embedding_model(header))
            except AbcliError:
                continue
            name = path.stem if listed.name == str(path) else listed.name
            if name not in found:
                found[name] = running.config_of(str(path.absolute()))
        if not found:
            raise UsageError("there are no models on this machine", "name one, or fetch one with `abcli pull`")
        return found


@dataclass(frozen=True)
class Loading:
    """How the models of a server are loaded."""

    terminal: Terminal
    running: RunningOptions
    buckets: ProfiledBucketOptions
    slots: int | None
    """Requests answered at once, None: as memory allows."""
    pooling: Pooling | None
    settings: Settings

    @contextmanager
    def loaded(self, name: str, config: ModelConfig) -> Iterator[Served]:
        """A model, which is served under a name until the block ends. Raises what loading raises."""
        settings = replace(self.settings, alias=name)
        if self.pooling is not None or makes_embeddings(config.path):
            yield from self._embeds(config, settings)
        else:
            yield from self._writes(config, settings)

    def _writes(self, config: ModelConfig, settings: Settings) -> Iterator[Served]:
        from abcli.serve.service import Service

        found = prepared_model(self.terminal, config, self.running, self.buckets)
        plan = plan_slots(self.slots, found, _MOST_AUTOMATIC if self.slots is None else None)
        self.terminal.note(plan.text(found.context.context_size, len(found.buckets.bases)))
        own = replace(found, context=replace(found.context, slots=plan.slots))
        with opened(self.terminal, own, self.running) as llm:
            check_sampling(settings.generation.sampling, llm.vocabulary_size)
            self._check_template(llm)
            with closing(Service(llm, settings)) as service:
                yield service

    def _check_template(self, llm: LLM) -> None:
        """Say of a model without a chat template that can be used what that means; one that is given has to be one."""
        try:
            _ = llm.template
        except TemplateError as error:
            if self.running.chat_template is not None:
                raise
            name = llm.model.path.name
            self.terminal.warn(f"{name} only continues texts, chats are refused: {error.message}; {error.hint}")

    def _embeds(self, config: ModelConfig, settings: Settings) -> Iterator[Served]:
        from abcli.serve.embeddings import EmbeddingService

        context = self.running.context_config()
        with self.terminal.working(f"loading {config.path.name}") as say:
            embedder = Embedder(config, context, pooling=self.pooling, say=say)
        with embedder, closing(EmbeddingService(embedder, settings)) as service:
            memory = gibibytes(embedder.memory.total)
            self.terminal.note(
                f"{config.path.name}: embeddings of {embedder.width} numbers, texts of up to "
                f"{embedder.context_size:,} tokens: about {memory}"
            )
            yield service
