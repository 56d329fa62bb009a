"""The JSON report of an evaluation: everything needed to repeat it, and to compute its statistics again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from abcli.atomic import write_atomically
from abcli.config import MAX_BUCKETS, MERGE_RULES, PREFILL_MODES, HeadNumbers
from abcli.errors import EvaluationDataError
from abcli.evals.configurations import Configuration
from abcli.evals.questions import Question
from abcli.evals.scores import Score
from abcli.evals.statistics import DEPTH_DECIMALS, NLL_DECIMALS, LengthSummary, summarise

if TYPE_CHECKING:
    from abcli.evals.runner import Evaluation, EvaluationSettings

FORMAT = "abcli-evaluation"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 28
MAX_DEPTHS = 1000
_MAX_NUMBER = 2**63 - 1
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


class _DamageError(Exception):
    """Why some bytes are not a report, as a phrase that continues "FILE ..."."""


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
    except _DamageError as error:
        raise EvaluationDataError(f"{origin} {error}", _HINT) from None


def _decode(data: bytes) -> EvaluationReport:
    if len(data) > MAX_BYTES:
        raise _DamageError(f"is larger than {MAX_BYTES:,} bytes")
    try:
        values = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _DamageError(f"is not UTF-8 (at byte {error.start:,})") from None
    except (ValueError, RecursionError) as error:
        raise _DamageError(f"is not a report: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise _DamageError("is not a report of `abcli eval`")
    version = values.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise _DamageError(f"has report format {version!r:.20}, and this abcli reads {FORMAT_VERSION}")
    configurations = tuple(_configuration(item) for item in _objects(values, "configurations"))
    names = [item.name for item in configurations]
    if not names or len(set(names)) < len(names):
        raise _DamageError("is damaged: its configurations are not distinct")
    items = _objects(values, "questions")
    if not items:
        raise _DamageError("is damaged: it has no questions")
    contexts = _object(values, "contexts")
    return EvaluationReport(
        task=_text(values, "task"),
        lengths=tuple(_whole({"lengths": item}, "lengths", 1) for item in _list(values, "lengths")),
        depths=_whole(values, "depths", 1, MAX_DEPTHS),
        limit=_whole(values, "limit", 1),
        seed=_whole(values, "seed", 0),
        data=tuple(
            DataFile(_text(item, "flag"), _text(item, "name"), _text(item, "sha256"))
            for item in _objects(values, "data")
        ),
        model=_model(_object(values, "model")),
        about=_object(values, "about"),
        configurations=configurations,
        questions=tuple(map(_question, items)),
        scores=_scores(names, items),
        contexts={group: _text(contexts, group) for group in contexts},
        costs=_costs(names, values),
    )


def _model(values: Mapping[str, Any]) -> RecordedModel:
    return RecordedModel(
        _text(values, "name"),
        _text(values, "fingerprint"),
        _text(values, "architecture"),
        _number(values, "native_base"),
    )


def _configuration(values: Mapping[str, Any]) -> Configuration:
    name, prefill_base = _text(values, "name"), values.get("prefill_base")
    bases = tuple(_number({"bases": item}, "bases") for item in _list(values, "bases"))
    merge = next((rule for rule in MERGE_RULES if rule == _text(values, "merge")), None)
    prefill = next((mode for mode in PREFILL_MODES if mode == _text(values, "prefill")), None)
    if merge is None or prefill is None or not 1 <= len(bases) <= MAX_BUCKETS:
        raise _DamageError(f"is damaged: configuration {name!r:.60} is impossible")
    return Configuration(
        name,
        bases,
        merge,
        prefill,
        None if prefill_base is None else _number(values, "prefill_base"),
        tuple(_number({"weights": item}, "weights") for item in _list(values, "weights")),
        _head_numbers(values, "gains"),
        _head_numbers(values, "head_multipliers"),
    )


def _head_numbers(values: Mapping[str, Any], key: str) -> HeadNumbers:
    """Reports of before there was such tuning have none."""
    layers = _list(values, key) if key in values else []
    return tuple(tuple(_number({key: number}, key) for number in _list({key: layer}, key)) for layer in layers)


def _question(values: Mapping[str, Any]) -> RecordedQuestion:
    depth = _number(values, "depth")
    if not 0 <= depth <= 1:
        raise _DamageError(f"is damaged: a depth is {depth}")
    return RecordedQuestion(
        _text(values, "identifier"),
        _text(values, "group"),
        _whole(values, "length", 1),
        depth,
        _text(values, "sha256"),
        _text(values, "text"),
        _text(values, "answer_start"),
        _text(values, "answer"),
    )


def _scores(names: Sequence[str], questions: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Score, ...]]:
    found: dict[str, list[Score]] = {name: [] for name in names}
    for question in questions:
        by_name = _object(question, "scores")
        if by_name.keys() != found.keys():
            raise _DamageError("is damaged: a question has not the scores of all configurations, and only those")
        for name in names:
            values = _object(by_name, name)
            exact, rank = values.get("exact"), values.get("rank")
            if not isinstance(exact, bool):
                raise _wrong("exact")
            nll = _number(values, "nll")
            if abs(nll) > _MAX_NLL:
                raise _DamageError(f"is damaged: a negative log-likelihood is {nll:g}")
            found[name].append(Score(nll, exact, None if rank is None else _whole(values, "rank", 0)))
    return {name: tuple(scores) for name, scores in found.items()}


def _costs(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, RecordedCost]:
    """Those of all configurations, or none: reports of older versions have none."""
    found = _object(values, "costs") if "costs" in values else {}
    if found and set(found) != set(names):
        raise _DamageError("is damaged: its costs are not those of all configurations")
    costs = {}
    for name in found:
        item = _object(found, name)
        speed, low, high = (_number(item, key) for key in ("tokens_per_second", "low", "high"))
        if min(speed, low, high) <= 0:
            raise _DamageError(f"is damaged: {name!r:.60} decodes {min(speed, low, high):g} tokens per second")
        costs[name] = RecordedCost(speed, low, high, _whole(item, "memory", 1))
    return costs


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _wrong(key: str) -> _DamageError:
    return _DamageError(f"is damaged: {key!r:.60} is missing or has the wrong type")


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    if not isinstance(value, dict):
        raise _wrong(key)
    return value


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    value = values.get(key)
    if not isinstance(value, list):
        raise _wrong(key)
    return value


def _objects(values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    items = _list(values, key)
    if not all(isinstance(item, dict) for item in items):
        raise _wrong(key)
    return items


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise _wrong(key)
    return value


def _whole(values: Mapping[str, Any], key: str, least: int, most: int = _MAX_NUMBER) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(key)
    if not least <= value <= most:
        raise _DamageError(f"is damaged: {key} is {value!r:.40}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _wrong(key)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _DamageError(f"is damaged: {key} is no finite number")
    return number
