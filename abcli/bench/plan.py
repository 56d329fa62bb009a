"""What is measured: which contenders, on how many tokens, in how many rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from abcli.config import DEFAULT_CONTEXT

# llama.cpp's own calls on so many sequences without a callback, or an engine with so many buckets.
Kind = Literal["raw", "contexts", "fused"]
EngineKind = Literal["contexts", "fused"]
# What is timed: decoding; a prompt that one bucket computes for all; a prompt that every bucket computes.
Phase = Literal["decode", "shared", "exact"]
PromptPhase = Literal["shared", "exact"]


@dataclass(frozen=True)
class Contender:
    """A row of the result."""

    buckets: int
    kind: Kind

    @property
    def name(self) -> str:
        """E.g. "contexts, 6 buckets" or "raw, 1 sequence"."""
        what = "sequence" if self.kind == "raw" else "bucket"
        return f"{self.kind}, {self.buckets} {what}" + ("" if self.buckets == 1 else "s")


# What everything is compared with: plain llama.cpp in abcli's engine, as `--buckets 1` has it.
ONE_BUCKET = Contender(1, "contexts")


@dataclass(frozen=True)
class BenchSettings:
    """What is asked for. `buckets` ascend and begin with 1; 0 tokens: that is not measured.

    Prompts take long, and exact ones longest: they are measured in every second and every fourth round.
    """

    buckets: tuple[int, ...] = (1, 2, 4, 6)
    engines: tuple[EngineKind, ...] = ("contexts", "fused")
    prompts: tuple[PromptPhase, ...] = ("shared", "exact")
    prompt_tokens: int = 64
    new_tokens: int = 12
    rounds: int = 6
    memory: bool = True
    context_size: int = DEFAULT_CONTEXT
    """Tokens of the context whose memory is measured; 1 or more."""

    def rounds_of(self, phase: Phase) -> int:
        """In how many rounds `phase` is measured."""
        return -(-self.rounds // {"decode": 1, "shared": 2, "exact": 4}[phase])

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """All rows, those with the same number of buckets together and the raw one first."""
        return tuple(contender for count in self.buckets for contender in self.group(count))

    def group(self, buckets: int) -> Iterator[Contender]:
        """The rows with `buckets` buckets; what all are compared with is always among them."""
        yield Contender(buckets, "raw")
        if buckets == 1 and "contexts" not in self.engines:
            yield ONE_BUCKET
        for kind in self.engines:
            yield Contender(buckets, kind)
