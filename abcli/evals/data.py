"""What tasks on a user's file share: reading it line by line, and filling contexts with its passages."""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

from abcli.errors import EvaluationDataError, UsageError
from abcli.evals.questions import CountTokens, Question, TaskSettings

MAX_LINE_BYTES = 16 << 20
# Of the unpacked file: a small gzip file can unpack to anything.
MAX_FILE_BYTES = 512 << 20
# A context with one passage leaves nothing to search.
LEAST_PASSAGES = 2

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A context counts as full once this many passages in a row were too long for what is left of it.
_PATIENCE = 10


@dataclass(frozen=True)
class Record:
    """A JSON object, whose fields are asked for by type, and the place in a file where it stands."""

    path: Path
    line: int
    fields: Mapping[str, Any]
    where: str = ""
    """Which object of the line it is, as a prefix of its fields' names; empty for the line itself."""

    def error(self, what: str, hint: str = "correct the line, or remove it") -> EvaluationDataError:
        """An error to raise that names file and line."""
        return line_error(self.path, self.line, what, hint)

    def text(self, name: str) -> str:
        """The string `name`. Raises EvaluationDataError if it is missing or blank, or is no string."""
        value = self._value(name, str, "a string")
        if not value.strip():
            raise self.error(f"{self._called(name)} is empty")
        return str(value)

    def truth(self, name: str, default: bool | None = None) -> bool:
        """The boolean `name`. Raises EvaluationDataError if it is none, or missing without a `default`."""
        if default is not None and self.fields.get(name) is None:
            return default
        return bool(self._value(name, bool, "true or false"))

    def items(self, name: str) -> list[Any]:
        """The list `name`. Raises EvaluationDataError if it is missing, empty or no list."""
        value: list[Any] = self._value(name, list, "a list")
        if not value:
            raise self.error(f"{self._called(name)} is empty")
        return value

    def texts(self, name: str) -> list[str]:
        """The list of strings `name`. Raises EvaluationDataError if it is anything else, or one is blank."""
        values = self.items(name)
        for index, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise self.error(f"{self._called(name)}[{index}] is not a string with something in it")
        return values

    def records(self, name: str) -> list[Record]:
        """The list of objects `name`. Raises EvaluationDataError if it is anything else."""
        return [self.inner(value, f"{name}[{index}]") for index, value in enumerate(self.items(name))]

    def record(self, name: str) -> Record:
        """The object `name`. Raises EvaluationDataError if it is anything else."""
        return self.inner(self._value(name, dict, "an object"), name)

    def inner(self, value: object, name: str) -> Record:
        """`value`, found in this object under `name`, as an object. Raises EvaluationDataError if it is none."""
        if not isinstance(value, dict):
            raise self.error(f"{self._called(name)} is not an object")
        return Record(self.path, self.line, value, f"{self._called(name)}.")

    def _called(self, name: str) -> str:
        return f"{self.where}{name}"

    def _value(self, name: str, kind: type, called: str) -> Any:
        if name not in self.fields:
            raise self.error(f"{self._called(name)} is missing")
        value = self.fields[name]
        if not isinstance(value, kind):
            raise self.error(f"{self._called(name)} is not {called}")
        return value


def line_error(path: Path, line: int, what: str, hint: str) -> EvaluationDataError:
    """An error to raise about `line` (from 1) of the file `path`."""
    return EvaluationDataError(f"{path}, line {line}: {what}", hint)


def read_records(path: Path | None, missing: str, hint: str) -> Iterator[Record]:
    """The objects of a file of JSON lines, plain or packed with gzip; blank lines are passed over.

    Raises UsageError with `hint` if there is no path (`missing` says what lacks) or no such file, and
    EvaluationDataError, with the line where one is to blame, for a file that cannot be read.
    """
    if path is None:
        raise UsageError(missing, hint)
    empty = True
    for number, line in _lines(path, hint):
        if line.strip():
            empty = False
            yield Record(path, number, _parsed(path, number, line))
    if empty:
        raise EvaluationDataError(f"{path} is empty", hint)


def _lines(path: Path, hint: str) -> Iterator[tuple[int, bytes]]:
    number, total = 1, 0
    try:
        with path.open("rb") as packed, _unpacked(packed, packed.peek(2)) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                total += len(line)
                if len(line) > MAX_LINE_BYTES:
                    what = f"it is longer than {MAX_LINE_BYTES >> 20} MiB"
                    raise line_error(path, number, what, "the file should hold one JSON object a line")
                if total > MAX_FILE_BYTES:
                    what = f"the file is larger than {MAX_FILE_BYTES >> 20} MiB"
                    raise line_error(path, number, what, "give a part of it")
                yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                number += 1
    except EOFError:
        raise line_error(path, number, "the gzip file breaks off", "fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise line_error(path, number, f"the gzip file is damaged: {error}", "fetch it again") from None
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", hint) from None
    except OSError as error:
        raise EvaluationDataError(f"{path} cannot be read: {error.strerror or error}", hint) from None
    except ValueError as error:
        # A path with a null character.
        raise UsageError(f"{str(path)!r} is no file name: {error}", hint) from None


def _unpacked(stream: IO[bytes], head: bytes) -> IO[bytes]:
    """`stream`, or what it unpacks to, as its first bytes tell; a name's ending may be wrong."""
    return cast(IO[bytes], gzip.open(stream)) if head.startswith(_GZIP_MAGIC) else stream


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    hint = "the file should hold one JSON object a line, in UTF-8"
    try:
        text = line.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise line_error(path, number, f"byte {error.start + 1} is not UTF-8", hint) from None
    except UnicodeEncodeError:
        raise line_error(path, number, "it holds half a surrogate pair, which is no character", hint) from None
    except json.JSONDecodeError as error:
        raise line_error(path, number, f"not JSON: {error.msg} (column {error.colno})", hint) from None
    except RecursionError:
        raise line_error(path, number, "its objects are nested too deeply", hint) from None
    except ValueError as error:
        raise line_error(path, number, f"not JSON: {error}", hint) from None
    if not isinstance(value, dict):
        raise line_error(path, number, "it is not a JSON object", hint)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


PassageT = TypeVar("PassageT", bound=Hashable)


@dataclass(frozen=True)
class Filled(Generic[PassageT]):
    """A context, its passages in order, and the depth (0 to 1) of the needed one."""

    context: str
    passages: tuple[PassageT, ...]
    depth: float


class ContextFiller(Generic[PassageT]):
    """Fills contexts of one length with passages; counts the tokens of each passage once."""

    def __init__(self, render: Callable[[Sequence[PassageT]], str], count: CountTokens, length: int) -> None:
        """`render` makes the text of a context that is to have at most `length` tokens."""
        self._render = render
        self._count = count
        self._length = length
        self._costs: dict[PassageT, int] = {}

    def fill(self, needed: PassageT, others: Iterable[PassageT], depth: float, seed: str) -> Filled[PassageT] | None:
        """A context with `needed` at `depth` among as many of `others` as fit, the first of them preferred.

        The others stand in a random order, which `seed` decides. None if not even one of them fits.
        """
        chosen = self._choose(needed, others)
        # The costs leave out what passages do to each other's tokens, so the whole is counted.
        while len(chosen) + 1 >= LEAST_PASSAGES:
            order = shuffled(chosen, seed)
            position = round(depth * len(order))
            order.insert(position, needed)
            context = self._render(order)
            if self._count(context) <= self._length:
                return Filled(context, tuple(order), position / len(chosen))
            chosen.pop()
        return None

    def _choose(self, needed: PassageT, others: Iterable[PassageT]) -> list[PassageT]:
        room = self._length - self._cost(needed)
        chosen: list[PassageT] = []
        misses = 0
        for passage in others:
            if misses == _PATIENCE or room <= 0:
                break
            cost = self._cost(passage)
            if cost > room:
                misses += 1
                continue
            chosen.append(passage)
            room -= cost
            misses = 0
        return chosen

    def _cost(self, passage: PassageT) -> int:
        if passage not in self._costs:
            self._costs[passage] = self._count(f"{self._render([passage])}\n")
        return self._costs[passage]


EntryT = TypeVar("EntryT")


def shuffled(entries: Sequence[EntryT], seed: str) -> list[EntryT]:
    """`entries` in the random order that `seed` decides, the same everywhere."""
    return random.Random(seed).sample(entries, len(entries))  # noqa: S311 (nothing secret)


def take_turns(
    task: str, settings: TaskSettings, entries: Sequence[EntryT], make: Callable[[EntryT, float, str], Question | None]
) -> list[Question]:
    """The first `settings.limit` questions that `make` makes of `entries`, the depths taken in turn.

    `make` gets an entry, the depth to ask at and the question's identifier; it answers None for an entry that
    cannot be used. Raises EvaluationDataError if there are too few others.
    """
    questions: list[Question] = []
    for entry in entries:
        turn = len(questions)
        depth = (turn % settings.depths) / max(settings.depths - 1, 1)
        question = make(entry, depth, f"{task}/{settings.length}/{turn:04d}")
        if question is not None:
            questions.append(question)
        if len(questions) == settings.limit:
            return questions
    raise EvaluationDataError(
        f"{len(questions)} of the {len(entries)} questions in {settings.data} can be asked in contexts of "
        f"{settings.length} tokens, but {settings.limit} are wanted",
        "ask for fewer questions or for longer contexts, or give more data",
    )
