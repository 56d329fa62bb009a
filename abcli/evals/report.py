"""The JSON report of an evaluation: everything needed to repeat it, and to compute its statistics again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abcli.atomic import write_atomically
from abcli.config import MAX_BUCKETS, MERGE_RULES, PREFILL_MODES, HeadNumbers
from abcli.errors import EvaluationDataError
from abcli.evals.configurations import Configuration
from abcli.evals.questions import Question
from abcli.evals.scores import Score
from abcli.evals.statistics import DEPTH_DECIMALS, NLL_DECIMALS, LengthSummary, summarise
from abcli.strict_json import (
    FormatError,
    boolean,
    check_version,
    items,
    mapping,
    mappings,
    number,
    numbers,
    one_of,
    parsed,
    text,
    whole,
)

if TYPE_CHECKING:
    from abcli.evals.runner import Evaluation, EvaluationSettings

FORMAT = "abcli-evaluation"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 28
MAX_DEPTHS = 1000
# Far above any; sums of such are still numbers.
_MAX_NLL = 1e9
_BLOCK = 1 << 20
_HINT = "name a report that `abcli eval --output` has written"


@dataclass(frozen=True)
class RecordedModel:
    """Which model was asked: `name` is its file's, `fingerprint` that of abcli.gguf.fingerprint."""

    name: str
    fingerprint: str
    architecture: str
    native_base: float


@dataclass(frozen=True)
class DataFile:
    """A file, or a directory of files, that the prompts were made of; no digest for what abcli knows by name."""

    flag: str
    name: str
    sha256: str


@dataclass(frozen=True)
class RecordedQuestion:
    """A question without its context. `sha256` is the digest of all there is to it, context and candidates included."""

    identifier: str
    group: str
    length: int
    depth: float
    sha256: str
    text: str
    answer_start: str
    answer: str


@dataclass(frozen=True)
class RecordedCost:
    """What a configuration costs: tokens per second (median and middle half of some rounds), and predicted bytes."""

    tokens_per_second: float
    low: float
    high: float
    memory: int


@dataclass(frozen=True)
class EvaluationReport:
    """What was asked, of whom, and the score of every configuration on every question."""

    task: str
    lengths: tuple[int, ...]
    depths: int
    limit: int
    seed: int
    data: tuple[DataFile, ...]
    model: RecordedModel
    about: Mapping[str, Any]
    """Versions and engine settings, ready for JSON; for people, nothing is computed from it."""
    configurations: tuple[Configuration, ...]
    questions: tuple[RecordedQuestion, ...]
    scores: Mapping[str, tuple[Score, ...]]
    """By the configuration's name, in the order of `questions`."""
    contexts: Mapping[str, str] = field(default_factory=dict)
    """By group; empty unless they were asked for: seed and data give them again."""
    costs: Mapping[str, RecordedCost] = field(default_factory=dict)
    """By the configuration's name; empty unless they were measured."""

    def summaries(self) -> tuple[LengthSummary, ...]:
        """The statistics, by length. Raises EvaluationDataError for scores that are no finite numbers."""
        return summarise(self.questions, self.scores, self.depths, seed=self.seed)


def make_report(
    settings: EvaluationSettings,
    evaluation: Evaluation,
    model: RecordedModel,
    data: Sequence[DataFile],
    *,
    contexts: bool = False,
) -> EvaluationReport:
    """The report of an evaluation of `model` with these settings and data, with all contexts if `contexts`."""
    return EvaluationReport(
        task=settings.task,
        lengths=settings.lengths,
        depths=settings.depths,
        limit=settings.limit,
        seed=settings.seed,
        data=tuple(data),
        model=model,
        about=evaluation.about,
        configurations=evaluation.configurations,
        questions=tuple(map(record, evaluation.questions)),
        scores=evaluation.scores,
        contexts={question.group: question.context for question in evaluation.questions} if contexts else {},
    )


def record(question: Question) -> RecordedQuestion:
    """What a report keeps of `question`."""
    whole = [question.context, question.text, question.answer_start, question.answer, *question.candidates]
    return RecordedQuestion(
        question.identifier,
        question.group,
        question.length,
        round(question.depth, DEPTH_DECIMALS),
        hashlib.sha256(json.dumps(whole).encode()).hexdigest(),
        question.text,
        question.answer_start,
        question.answer,
    )


def data_file(flag: str, path: Path) -> DataFile:
    """The name and digest of what `flag` names: a file's bytes, or the names and bytes of a directory's files.

    Only the last part of the path is kept. Raises EvaluationDataError for what cannot be read.
    """
    digest = hashlib.sha256()
    try:
        parts = [path]
        if path.is_dir():
            # A directory stands for its .txt files, as in the tasks.
            parts = sorted(part for part in path.iterdir() if part.suffix == ".txt" and part.is_file())
        for part in parts:
            if part != path:
                digest.update(f"{part.name}\0{part.stat().st_size}\0".encode(errors="surrogateescape"))
            with part.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    except OSError as error:
        raise EvaluationDataError(
            f"{path} cannot be read: {error.strerror or error}", f"check the path that {flag} gives"
        ) from None
    return DataFile(flag, path.resolve().name, digest.hexdigest())


def encode_report(report: EvaluationReport, summaries: Sequence[LengthSummary]) -> bytes:
    """`report` as JSON in UTF-8, with its `summaries` for whoever reads it with other tools."""
    questions = [
        {
            **asdict(question),
            "scores": {
                name: {"nll": round(of[index].nll, NLL_DECIMALS), "exact": of[index].exact, "rank": of[index].rank}
                for name, of in report.scores.items()
            },
        }
        for index, question in enumerate(report.questions)
    ]
    values = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "task": report.task,
        "lengths": report.lengths,
        "depths": report.depths,
        "limit": report.limit,
        "seed": report.seed,
        "data": [asdict(item) for item in report.data],
        "model": asdict(report.model),
        "about": report.about,
        "configurations": [asdict(item) for item in report.configurations],
        "summaries": [asdict(summary) for summary in summaries],
        "questions": questions,
        "contexts": report.contexts,
        "costs": {name: asdict(cost) for name, cost in report.costs.items()},
    }
    # Half a character, which a file name or an argument may hold, has no place in UTF-8.
    return (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")


def write_report(path: Path, report: EvaluationReport, summaries: Sequence[LengthSummary]) -> None:
    """Write `report` so that it is there whole or not at all. Raises OSError."""
    write_atomically(path, encode_report(report, summaries))


def read_report(path: Path) -> EvaluationReport:
    """The report in the file `path`, without its summaries. Raises EvaluationDataError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise EvaluationDataError(f"{path} cannot be read: {reason}", _HINT) from None
    return decode_report(data, str(path))


def decode_report(data: bytes, origin: str) -> EvaluationReport:
    """The report in `data`, without its summaries. Raises EvaluationDataError, which begins with `origin`."""
    try:
        return _decode(data)
    except FormatError as error:
        raise EvaluationDataError(f"{origin} {error}", _HINT) from None


def _decode(data: bytes) -> EvaluationReport:
    if len(data) > MAX_BYTES:
        raise FormatError(f"is larger than {MAX_BYTES:,} bytes")
    values = parsed(data)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise FormatError("is not a report of `abcli eval`")
    check_version(values.get("version"), FORMAT_VERSION, "report")
    configurations = tuple(map(_configuration, mappings(values, "configurations")))
    names = [item.name for item in configurations]
    if not names or len(set(names)) < len(names):
        raise FormatError("is damaged: its configurations are not distinct")
    questions = mappings(values, "questions")
    if not questions:
        raise FormatError("is damaged: it has no questions")
    model = mapping(values, "model")
    return EvaluationReport(
        task=text(values, "task"),
        lengths=tuple(whole({"lengths": item}, "lengths", 1) for item in items(values, "lengths")),
        depths=whole(values, "depths", 1, MAX_DEPTHS),
        limit=whole(values, "limit", 1),
        seed=whole(values, "seed", 0),
        data=tuple(
            DataFile(text(item, "flag"), text(item, "name"), text(item, "sha256")) for item in mappings(values, "data")
        ),
        model=RecordedModel(
            text(model, "name"),
            text(model, "fingerprint"),
            text(model, "architecture"),
            number(model, "native_base"),
        ),
        about=mapping(values, "about"),
        configurations=configurations,
        questions=tuple(map(_question, questions)),
        scores=_scores(names, questions),
        contexts={
            group: text({"contexts": context}, "contexts") for group, context in mapping(values, "contexts").items()
        },
        costs=_costs(names, values),
    )


def _configuration(values: Mapping[str, Any]) -> Configuration:
    name, bases = text(values, "name"), numbers(values, "bases")
    if not 1 <= len(bases) <= MAX_BUCKETS:
        raise FormatError(f"is damaged: configuration {name!r:.60} has {len(bases):,} bases")
    return Configuration(
        name,
        bases,
        one_of(values, "merge", MERGE_RULES),
        one_of(values, "prefill", PREFILL_MODES),
        None if values.get("prefill_base") is None else number(values, "prefill_base"),
        numbers(values, "weights"),
        _head_numbers(values, "gains"),
        _head_numbers(values, "head_multipliers"),
    )


def _head_numbers(values: Mapping[str, Any], key: str) -> HeadNumbers:
    """Reports of before there was such tuning have none."""
    return tuple(numbers({key: layer}, key) for layer in (items(values, key) if key in values else ()))


def _question(values: Mapping[str, Any]) -> RecordedQuestion:
    depth = number(values, "depth")
    if not 0 <= depth <= 1:
        raise FormatError(f"is damaged: a depth is {depth}")
    return RecordedQuestion(
        text(values, "identifier"),
        text(values, "group"),
        whole(values, "length", 1),
        depth,
        text(values, "sha256"),
        text(values, "text"),
        text(values, "answer_start"),
        text(values, "answer"),
    )


def _scores(names: Sequence[str], questions: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Score, ...]]:
    found: dict[str, list[Score]] = {name: [] for name in names}
    for question in questions:
        by_name = mapping(question, "scores")
        if by_name.keys() != found.keys():
            raise FormatError("is damaged: a question has not the scores of all configurations, and only those")
        for name in names:
            values = mapping({"scores": by_name[name]}, "scores")
            nll = number(values, "nll")
            if abs(nll) > _MAX_NLL:
                raise FormatError(f"is damaged: a negative log-likelihood is {nll:g}")
            rank = None if values.get("rank") is None else whole(values, "rank", 0)
            found[name].append(Score(nll, boolean(values, "exact"), rank))
    return {name: tuple(scores) for name, scores in found.items()}


def _costs(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, RecordedCost]:
    """Those of all configurations, or none: reports of older versions have none."""
    found = mapping(values, "costs") if "costs" in values else {}
    if found and set(found) != set(names):
        raise FormatError("is damaged: its costs are not those of all configurations")
    costs = {}
    for name in found:
        item = mapping({"costs": found[name]}, "costs")
        speed, low, high = (number(item, key) for key in ("tokens_per_second", "low", "high"))
        if min(speed, low, high) <= 0:
            raise FormatError(f"is damaged: {name!r:.60} decodes {min(speed, low, high):g} tokens per second")
        costs[name] = RecordedCost(speed, low, high, whole(item, "memory", 1))
    return costs
