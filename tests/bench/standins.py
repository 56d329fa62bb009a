"""A workshop without llama.cpp, whose contenders move a clock by as much as they are said to take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from abcli.bench.measure import Findings
from abcli.bench.plan import BenchSettings, Contender, EngineKind, PromptPhase
from abcli.bench.report import BenchReport, Circumstances, make_report
from abcli.bench.resident import Memory
from abcli.bench.workshop import AutoChoice
from abcli.config import ContextConfig
from abcli.errors import OutOfMemoryError, UnsupportedModelError

SETTINGS = BenchSettings((1, 2, 3), prompt_tokens=10, new_tokens=4, rounds=4)


class Time:
    """A clock that only its users move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def seconds_per_token(contender: Contender) -> float:
    """What a token takes: one sequence 1 s, a batch a little more for each, the engines more again."""
    factor = {"raw": 1.0, "contexts": 1.5, "fused": 1.25}[contender.kind]
    return factor * (1 + 0.5 * (contender.buckets - 1))


class FakePlayer:
    """Takes `seconds_per_token` for each token; remembers in what order it was used."""

    def __init__(self, workshop: FakeWorkshop, contender: Contender, prompts: PromptPhase) -> None:
        self._workshop = workshop
        self._contender = contender
        self._settings = workshop.settings
        self.shares = prompts == "shared" and contender.kind != "raw" and contender.buckets > 1
        self.shares = self.shares and contender not in workshop.not_sharing
        self.turning_note = "rows are turned somehow" if contender.kind == "fused" and contender.buckets > 1 else ""
        self.prompt_note = "shared prefill" if self.shares else "exact prefill: there is a reason"
        self.held = 0

    def empty(self) -> None:
        self.held = 0
        self._workshop.time.now += 1000  # not to be counted

    def read(self, limit: int | None = None) -> None:
        assert self.held == 0
        prompt = self._settings.prompt_tokens
        self.held = prompt if limit is None else min(limit, prompt)
        cost = 0.1 if self.shares else 0.1 * self._contender.buckets
        self._spend(self.held * cost)

    def rewind(self) -> None:
        self.held = self._settings.prompt_tokens
        self._workshop.time.now += 1000

    def decode(self) -> None:
        assert self.held == self._settings.prompt_tokens
        self.held += self._settings.new_tokens
        self._spend(self._settings.new_tokens * seconds_per_token(self._contender))

    def _spend(self, seconds: float) -> None:
        self._workshop.spent += 1
        if self._workshop.spent == self._workshop.fail_after:
            raise self._workshop.failure
        self._workshop.time.now += seconds


class FakeWorkshop:
    """Implements `Workshop`; tests change its attributes."""

    def __init__(self, settings: BenchSettings = SETTINGS) -> None:
        self.settings = settings
        self.time = Time()
        self.spent = 0
        self.fail_after = 0
        self.failure: BaseException = KeyboardInterrupt()
        self.refusals: dict[Contender, str] = {}
        self.broken: set[Contender] = set()
        self.not_sharing: set[Contender] = set()
        self.largest = 99
        self.open_now: list[Contender] = []
        self.most_open = 0
        self.asked: list[tuple[int, dict[EngineKind, float]]] = []

    def bases(self, buckets: int) -> tuple[float, ...]:
        return tuple(1e4 * (1 + bucket) for bucket in range(buckets))

    def refusal(self, contender: Contender) -> str:
        return self.refusals.get(contender, "")

    def check_room(self, contenders: Iterable[Contender], prompts: PromptPhase) -> None:
        if max(contender.buckets for contender in contenders) > self.largest:
            raise OutOfMemoryError("too much")

    @contextmanager
    def open(self, contender: Contender, prompts: PromptPhase) -> Iterator[FakePlayer]:
        if contender in self.broken:
            raise UnsupportedModelError("it broke")
        self.open_now.append(contender)
        self.most_open = max(self.most_open, len(self.open_now))
        try:
            yield FakePlayer(self, contender, prompts)
        finally:
            self.open_now.remove(contender)

    def memory(self, contender: Contender) -> Memory:
        return Memory(2000 * contender.buckets, 1000 * contender.buckets, 0)

    def choice(self, buckets: int, seconds: Mapping[EngineKind, float]) -> AutoChoice | None:
        self.asked.append((buckets, dict(seconds)))
        if buckets == 1:
            return AutoChoice("contexts", "there is one bucket")
        return AutoChoice("fused", "it is faster") if len(seconds) == 2 else None


def report_of(findings: Findings, settings: BenchSettings = SETTINGS) -> BenchReport:
    """The report of what was found, on some machine."""
    where = Circumstances(
        "model.gguf", "llama 1M", "0123", "llama.cpp", (("CPU", "a processor"),), 2, -1, ContextConfig()
    )
    return make_report(settings, where, findings, FakeWorkshop().bases)
