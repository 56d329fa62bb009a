"""Makes the trace of an answer: what was recorded while it was decoded, and a pass over it that reads attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig
from abcli.engine.engine import Engine
from abcli.errors import NativeError, OutOfMemoryError
from abcli.generate import common_prefix
from abcli.merge import Merger
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.rope.bases import nearest_base
from abcli.rope.frequencies import angular_frequencies
from abcli.rope.parameters import rope_parameters
from abcli.rope.waveform import value_at_zero, waveforms
from abcli.sampling import Choice
from abcli.trace.attention import Progress, read_attention, summarised
from abcli.trace.recorder import Recorder, texts
from abcli.trace.trace import Attention, Step, Trace, passages_of


@dataclass(frozen=True)
class Tracer:
    """Traces answers of an engine; `context` and `buckets` are what the engine was made with."""

    model: Model
    engine: Engine
    context: ContextConfig
    buckets: Buckets

    @property
    def native(self) -> int:
        """The bucket whose base is nearest to the model's own."""
        return nearest_base(self.engine.bases, self.model.checked.header.native_base)

    def recorder(self) -> Recorder:
        """What observes the choices of one answer."""
        return Recorder(self.native, self._text)

    def replay(self, prompt: Sequence[int], answer: Sequence[int], slot: int) -> Recorder:
        """What would have been recorded while `answer` was decoded: its tokens are decoded again in `slot`.

        All buckets are asked for every token. Raises as the engine's `step` does.
        """
        recorder = self.recorder()
        engine, buckets = self.engine, self.buckets
        merger = Merger(len(engine.bases), engine.vocabulary_size)
        kept = min(common_prefix(engine.tokens(slot), prompt), len(prompt) - 1)
        logits = engine.prefill(slot, prompt[engine.truncate(slot, kept) :])
        for token in answer:
            merged = merger.merge(logits, buckets.merge, buckets.weights)
            alone = len(logits) == 1
            chosen = logits[0] if alone else merged.logits
            recorder(Choice(token, logits, chosen, merged.weights, None if alone else merged.agreement))
            logits = engine.step({slot: token})[slot]
        return recorder

    def finish(
        self,
        recorder: Recorder,
        prompt: Sequence[int],
        slot: int,
        cancel: CancelFlag,
        progress: Progress = lambda _done, _total: None,
    ) -> Trace:
        """The trace of the answer that `recorder` has observed in `slot`. Raises CancelledError."""
        steps = recorder.steps
        told = self._told([*prompt, *(step.token for step in steps)])
        texts = told[: len(prompt)]
        passages = passages_of(texts)
        attention, reason = None, ""
        if steps:
            try:
                attention = self._attention(steps, prompt, slot, passages, cancel, progress)
            except (NativeError, OutOfMemoryError) as error:
                reason = error.message
        return Trace(
            model=self.model.checked.name,
            native_base=self.model.checked.header.native_base,
            bases=self.engine.bases,
            native=self.native,
            merge=self.buckets.merge,
            prompt_tokens=tuple(prompt),
            prompt=tuple(texts),
            passages=passages,
            steps=tuple(replace(step, text=text) for step, text in zip(steps, told[len(prompt) :], strict=True)),
            waves=self._waves(len(prompt)),
            attention=attention,
            without_attention=reason,
        )

    def _attention(
        self,
        steps: Sequence[Step],
        prompt: Sequence[int],
        slot: int,
        passages: Sequence[tuple[int, int]],
        cancel: CancelFlag,
        progress: Progress,
    ) -> Attention:
        engine = self.engine
        shared = engine.sharing.shared and len(prompt) >= engine.least_shared
        before = len(prompt) - 1
        held = shared and list(engine.tokens(slot)[:before]) == list(prompt[:before])
        weights = np.zeros((len(steps), len(engine.bases)))
        for row, step in zip(weights, steps, strict=True):
            for view in step.views:
                row[view.bucket] = view.weight
        reading = read_attention(
            self.model,
            self.context,
            engine.bases,
            [*prompt, *(step.token for step in steps[:-1])],
            before,
            prefill_base=self.buckets.prefill_base if shared else None,
            cells=(piece.data for piece in engine.cells(slot, before)) if held else (),
            cancel=cancel,
            progress=progress,
        )
        return summarised(reading, weights, len(prompt), passages)

    def _waves(self, length: int) -> NDArray[np.float32]:
        """The wave of each bucket at distances 0 .. length - 1."""
        header = self.model.checked.header
        parameters = rope_parameters(header, neox=False, context_size=self.context.context_size)
        if not self.model.has_rope or parameters.dimensions < 2:
            return np.empty((len(self.engine.bases), 0), np.float32)
        frequencies = np.array([angular_frequencies(parameters, base) for base in self.engine.bases])
        return (waveforms(frequencies, length) / value_at_zero(frequencies.shape[1])).astype(np.float32)

    def _text(self, token: int) -> str:
        """What one token stands for; bytes that are no text by themselves as `\\xhh`."""
        return self.model.piece(token, special=True).decode("utf-8", "backslashreplace")

    def _told(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token ends, control tokens by their names."""
        return texts(self.model.piece(token, special=True) for token in tokens)
