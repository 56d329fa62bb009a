"""The benchmark itself: for each number of buckets, both engines and the raw batch side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from abcli.bench.contenders import Player
from abcli.bench.plan import ONE_BUCKET, BenchSettings, Contender, EngineKind, Phase, PromptPhase
from abcli.bench.resident import Memory
from abcli.bench.rounds import Clock, Rounds, Turn, take_turns
from abcli.bench.workshop import AutoChoice, Workshop
from abcli.errors import AbcliError, OutOfMemoryError
from abcli.text import StageProgress, counted

# Enough to load what is needed for many tokens at once, where the whole prompt would take long.
_WARM_TOKENS = 32


@dataclass
class Findings:
    """All that has been found out so far; an interruption leaves it sound.

    `rounds` are seconds per token, by number of buckets and phase. `left_out` says why a contender has no numbers,
    `prompt_notes` how an engine reads prompts, `turning_notes` how its rows come to have several bases.
    """

    rounds: dict[tuple[int, Phase], Rounds[Contender]] = field(default_factory=dict)
    prompt_notes: dict[Contender, str] = field(default_factory=dict)
    turning_notes: dict[Contender, str] = field(default_factory=dict)
    left_out: dict[Contender, str] = field(default_factory=dict)
    memory: dict[Contender, Memory] = field(default_factory=dict)
    choices: dict[int, AutoChoice] = field(default_factory=dict)
    complete: bool = False
    other_cores: float = 0.0
    """How many cores other programs kept busy in the meantime."""

    def timed(self, buckets: int, phase: Phase) -> Rounds[Contender]:
        """The rounds of a phase, to be filled or read."""
        return self.rounds.setdefault((buckets, phase), Rounds())


def benchmark(
    settings: BenchSettings,
    workshop: Workshop,
    findings: Findings,
    progress: StageProgress,
    clock: Clock = perf_counter,
) -> None:
    """Measure what `settings` ask for into `findings`.

    A contender that cannot be served is left out with the reason; one bucket must be possible. Raises what making
    and running it raises; what was measured before stays in `findings`.
    """
    for contender in settings.contenders:
        if reason := workshop.refusal(contender):
            findings.left_out[contender] = reason
    bench = _Bench(settings, workshop, findings, progress, clock)
    for buckets in settings.buckets:
        bench.compare(buckets)
    bench.measure_memory()
    findings.complete = True


class _Bench:
    def __init__(
        self, settings: BenchSettings, workshop: Workshop, findings: Findings, progress: StageProgress, clock: Clock
    ) -> None:
        self._settings = settings
        self._workshop = workshop
        self._findings = findings
        self._progress = progress
        self._clock = clock

    def compare(self, buckets: int) -> None:
        """Measure all with so many buckets: decoding, prompts, and what "auto" makes of it."""
        settings, findings = self._settings, self._findings
        sharing = buckets > 1 and "shared" in settings.prompts and settings.prompt_tokens > 0
        with ExitStack() as stack:
            players = self._open(buckets, "shared" if sharing else "exact", stack)
            if not players:
                return
            self._warm(players, buckets)
            if settings.prompt_tokens and sharing:
                sharers = {name: player for name, player in players.items() if player.shares or name == ONE_BUCKET}
                if len(sharers) > 1:
                    self._time(buckets, "shared", sharers)
            elif settings.prompt_tokens:
                self._time(buckets, "exact", players)
            if settings.new_tokens:
                self._time(buckets, "decode", players)
        seconds = self._decoding(buckets)
        choice = self._workshop.choice(buckets, seconds)
        if choice is not None:
            findings.choices[buckets] = choice
        if sharing and "exact" in settings.prompts:
            with ExitStack() as stack:
                players = self._open(buckets, "exact", stack)
                if players:
                    self._warm(players, buckets, _WARM_TOKENS)
                    self._time(buckets, "exact", players)

    def measure_memory(self) -> None:
        """Measure the memory of every engine that has been measured."""
        if not self._settings.memory:
            return
        wanted = [c for c in self._settings.contenders if c.kind != "raw" and c not in self._findings.left_out]
        self._progress("memory", 0, len(wanted))
        for done, contender in enumerate(wanted, start=1):
            self._findings.memory[contender] = self._workshop.memory(contender)
            self._progress("memory", done, len(wanted))

    def _open(self, buckets: int, prompts: PromptPhase, stack: ExitStack) -> dict[Contender, Player]:
        """All that can be measured with so many buckets, and one bucket to compare it with; empty if there is none."""
        findings = self._findings
        group = [name for name in self._settings.group(buckets) if name not in findings.left_out]
        if not group:
            return {}
        if ONE_BUCKET not in group:
            group.insert(0, ONE_BUCKET)
        try:
            self._workshop.check_room(group, prompts)
        except OutOfMemoryError as error:
            if buckets == 1:
                raise
            self._leave_out(group, error.message)
            return {}
        players = {}
        for name in group:
            try:
                players[name] = stack.enter_context(self._workshop.open(name, prompts))
            except AbcliError as error:
                if name == ONE_BUCKET:
                    raise
                self._leave_out([name], error.message)
                continue
            if name.kind != "raw":
                findings.prompt_notes.setdefault(name, players[name].prompt_note)
                findings.turning_notes.setdefault(name, players[name].turning_note)
        return players if buckets == 1 or set(players) != {ONE_BUCKET} else {}

    def _leave_out(self, names: Iterable[Contender], reason: str) -> None:
        for name in names:
            if name != ONE_BUCKET:
                self._findings.left_out.setdefault(name, reason)

    def _warm(self, players: Mapping[Contender, Player], buckets: int, tokens: int | None = None) -> None:
        """Let everybody read the prompt, or its first `tokens`, and decode once: what is needed is then loaded."""
        if self._settings.prompt_tokens:
            self._progress(f"{counted(buckets, 'bucket')}, warming up", 0, len(players))
            for done, player in enumerate(players.values(), start=1):
                player.empty()
                player.read(tokens)
                self._progress(f"{counted(buckets, 'bucket')}, warming up", done, len(players))
        if tokens is None:
            for player in players.values():
                player.decode()

    def _time(self, buckets: int, phase: Phase, players: Mapping[Contender, Player]) -> None:
        settings = self._settings
        turns = {
            name: Turn(player.decode, settings.new_tokens, player.rewind)
            if phase == "decode"
            else Turn(player.read, settings.prompt_tokens, player.empty)
            for name, player in players.items()
        }
        rounds = settings.rounds_of(phase)
        what = f"{counted(buckets, 'bucket')}, {'decoding' if phase == 'decode' else f'{phase} prompts'}"
        done, total = 0, rounds * len(turns)

        def on_turn() -> None:
            nonlocal done
            done += 1
            self._progress(what, done, total)

        self._progress(what, 0, total)
        take_turns(turns, rounds, self._findings.timed(buckets, phase), on_turn, self._clock)

    def _decoding(self, buckets: int) -> dict[EngineKind, float]:
        """Median seconds per token of the engines with so many buckets."""
        found = self._findings.timed(buckets, "decode")
        times = {kind: found.seconds(Contender(buckets, kind)) for kind in self._settings.engines}
        return {kind: median(seconds) for kind, seconds in times.items() if seconds}
