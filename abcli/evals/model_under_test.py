"""The model under test: what it reads, and what its buckets answer under any base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from abcli.chat.template import ChatTemplate, load_template
from abcli.config import UNTUNED, Buckets, ContextConfig, PrefillMode, Tuning
from abcli.engine.engine import MIN_SHARED_TOKENS, Engine
from abcli.engine.make import make_engine
from abcli.engine.memory import check_memory
from abcli.errors import ContextFullError, UnsupportedModelError
from abcli.evals.prompts import PromptMaker, TokenizedQuestion
from abcli.evals.scorer import TraceStore, traces
from abcli.evals.traces import Trace
from abcli.gguf.checked import CheckedModel
from abcli.gguf.lora import warn_of_ignored
from abcli.native.crash_probe import ensure_loadable
from abcli.native.llama import version
from abcli.native.model import Model
from abcli.native.owner import Owner


@dataclass(frozen=True)
class Prefill:
    """How prompts are computed, and how the heads are tuned; bases that are prefilled alike are traced together."""

    mode: PrefillMode
    base: float
    tuning: Tuning = UNTUNED


class Subject(Owner):
    """A loaded model, its prompts, and the traces of its answers; one thread at a time."""

    def __init__(
        self,
        checked: CheckedModel,
        config: ContextConfig,
        chat_template: str | None = None,
        scores: Path | None = None,
        warn: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """Load a model; how long contexts are and how prompts are computed follows from the questions.

        Traces are kept below the directory `scores`, None for nowhere. Raises ModelFileError, UnsupportedModelError,
        NativeError and TemplateError.
        """
        ensure_loadable(checked)
        warn_of_ignored(checked.adapters, warn)
        self.checked = checked
        self.chat_template = chat_template
        self.config: ContextConfig = replace(config, slots=1, prompt_cache=None)
        self._scores = scores
        self._warn = warn
        with ExitStack() as stack:
            self.model: Model = stack.enter_context(Model(checked))
            if self.model.is_recurrent or not self.model.has_rope:
                raise UnsupportedModelError(
                    f"{checked.path.name} ({self.model.architecture}) has no RoPE base to vary",
                    "there is nothing to compare: use another model",
                )
            template: ChatTemplate | None = None
            if chat_template is not None or self.model.chat_template:
                template = load_template(self.model, chat_template)
            self.prompts: PromptMaker = PromptMaker(self.model, template)
            self._stack = stack.pop_all()

    @property
    def native_base(self) -> float:
        """The RoPE base the model was trained with."""
        return self.checked.header.native_base

    def prefill(self, mode: PrefillMode, base: float | None, tuning: Tuning = UNTUNED) -> Prefill:
        """How a configuration's prompts are computed: those of an evaluation are long enough for `auto` to share."""
        if mode == "exact":
            return Prefill("exact", self.native_base, tuning)
        return Prefill("shared", base or self.native_base, tuning)

    def trace(
        self,
        questions: Sequence[TokenizedQuestion],
        bases: Sequence[float],
        prefill: Prefill,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Trace]:
        """The traces of `questions` under `bases`: stored ones are read, the others computed and stored.

        `on_progress` gets (questions done, questions in all). Raises ContextFullError for a prompt longer than the
        model's trained context, OutOfMemoryError, NativeError, CancelledError, and OSError if a trace cannot be stored.
        """
        return list(self._traces(questions, sorted(set(bases)), prefill, on_progress or (lambda _done, _all: None)))

    def _traces(
        self,
        questions: Sequence[TokenizedQuestion],
        bases: list[float],
        prefill: Prefill,
        on_progress: Callable[[int, int], None],
    ) -> Iterator[Trace]:
        longest = max((len(q.prompt) + max(map(len, q.continuations)) for q in questions), default=0)
        if longest > self.model.trained_context:
            raise ContextFullError(longest, self.model.trained_context, "ask for a shorter `length`")
        config = replace(
            self.config,
            context_size=max(longest, MIN_SHARED_TOKENS),
            prefill=prefill.mode,
        )
        buckets = Buckets(tuple(bases), prefill.base)
        with ExitStack() as stack:

            def open_engine() -> Engine:
                check_memory(self.checked, config, buckets)
                model = self.model
                if prefill.tuning:
                    model = stack.enter_context(Model(self.checked.with_tuning(prefill.tuning)))
                return stack.enter_context(make_engine("contexts", model, config, buckets, self._warn))

            # A bucket alone would compute whole prompts, and its last bits would not be those it has in company.
            last_alone = prefill.mode == "shared" and len(bases) == 1
            found = traces(questions, bases, self._store(prefill), open_engine, last_alone=last_alone)
            on_progress(0, len(questions))
            for done, item in enumerate(found, start=1):
                on_progress(done, len(questions))
                yield item

    def _store(self, prefill: Prefill) -> TraceStore:
        """Where traces of this model and build, computed in this way, are kept."""
        if self._scores is None:
            return TraceStore(None)
        config = self.config
        key = (
            self.checked.with_tuning(prefill.tuning).fingerprint,
            version(),
            (prefill.mode, prefill.base),
            config.cache_type_k,
            config.cache_type_v,
            config.flash_attention,
            config.ubatch_size,
            self.checked.config.gpu_layers,
        )
        return TraceStore(self._scores / hashlib.sha256(repr(key).encode()).hexdigest()[:16])
