"""Prose to hide facts in: sentences of the user's text, or generated filler."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from abcli.errors import EvaluationDataError

MAX_PROSE_BYTES = 64 * 1024 * 1024
# A longer one (a table, a list) would leave no place for a fact near some depth.
MAX_SENTENCE_CHARACTERS = 400

_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n")
_CLOSING = "\"'\u201d\u2019\u00bb\uff09\u300d\u300f)\\]"
# Full-width marks end a sentence by themselves; the others before white space, or where it was lost ("end.Then").
_SENTENCE_END = re.compile(
    f"[.!?\u2026]+[{_CLOSING}]*(?=\\s|$)|(?<=[a-z]{{2}})[.!?](?=[A-Z][a-z])|[\u3002\uff01\uff1f]+[{_CLOSING}]*"
)
_ABBREVIATION = re.compile(
    "(?:^|[\\s(\"'\u201c\u2018])(?:[A-Z]|[A-Za-z]\\.[A-Za-z]|Mrs?|Ms|Drs?|Prof|St|vs|cf|etc|Fig)\\.$"
)

_PEOPLE = (
    "the baker", "the old teacher", "a young carpenter", "the night watchman", "my neighbour", "the librarian",
    "a travelling musician", "the postmaster", "the ferryman", "her eldest brother", "the gardener", "a retired sailor",
    "the schoolmaster", "their grandmother", "the innkeeper", "a visiting engineer", "the clockmaker", "the doctor",
    "a quiet student", "the mayor", "the shopkeeper", "an apprentice", "the widow next door", "the stationmaster",
)  # fmt: skip
_DEEDS = (
    "repaired", "painted", "admired", "carried away", "sold", "remembered", "inspected", "borrowed", "measured",
    "described", "cleaned", "wrapped up", "looked for", "forgot about", "asked about", "complained about",
    "drew a picture of", "paid for", "waited beside", "told a story about",
)  # fmt: skip
_THINGS = (
    "the wooden gate", "a basket of apples", "the broken lamp", "the long table", "a bundle of letters",
    "the garden bench", "an empty barrel", "the kitchen clock", "a pair of boots", "the map on the wall",
    "the church bell", "a heavy suitcase", "the narrow staircase", "a loaf of bread", "the fishing nets",
    "a faded photograph", "the window frames", "a worn leather chair", "the stone bridge", "an umbrella",
    "the weekly newspaper", "a box of candles", "the boat with the patched sail", "the rope ladder",
)  # fmt: skip
_PLACES = (
    "near the harbour", "behind the mill", "at the edge of the village", "in the market square", "by the river",
    "on the upper floor", "beside the railway line", "in the back room", "under the chestnut trees",
    "on the road to the coast", "opposite the town hall", "in the valley", "at the foot of the hill",
    "outside the bakery", "along the canal", "in a corner of the orchard",
)  # fmt: skip
_TIMES = (
    "early in the morning", "after the rain had stopped", "late in the summer", "on the last day of the week",
    "before the guests arrived", "towards the evening", "in the middle of the winter", "shortly after breakfast",
    "while the shops were closed", "as soon as the fog had lifted", "during the harvest", "just before midnight",
    "when the train was late", "on a windy afternoon", "in the weeks that followed", "at the end of the month",
)  # fmt: skip
_SCENES = (
    "the streets were almost empty", "smoke rose from the chimneys", "nobody in the house had slept well",
    "the water stood higher than usual", "the children were playing in the yard", "the wind smelled of salt",
    "a cart rolled slowly past", "the fire had gone out", "the leaves had begun to fall", "the path was muddy",
    "music came from an open window", "the lanterns were being lit", "the fields lay under snow",
    "everyone was talking about the weather", "the kettle began to sing", "the last boat had already left",
)  # fmt: skip
_REMARKS = (
    "nobody was surprised", "it took longer than expected", "there was little else to do", "the reason was simple",
    "the weather was to blame", "everybody agreed that it was worth the trouble", "the work was soon finished",
    "it hardly made a difference", "people spoke of it for years", "the others only laughed",
    "no one asked why", "it had always been done that way",
)  # fmt: skip
_FRAMES = (
    "{time} {person} {deed} {thing} {place}.",
    "{person} {deed} {thing}, and {remark}.",
    "{scene} when {person} {deed} {thing}.",
    "{place} {person} {deed} {thing}, although {scene}.",
    "{scene}, and {person} {deed} {thing} {time}.",
    "{person} {deed} {thing} because {remark}.",
    "{time} {person} {deed} {thing}, but {remark}.",
    "{scene}, but {remark}.",
    "it was {person} who {deed} {thing} {time}.",
    "{remark}, so {person} {deed} {thing} {place}.",
    "{time} {scene}, and {remark}.",
    "{person} had never {experience}, but {remark}.",
)
_EXPERIENCES = (
    "lived anywhere else", "seen the sea", "learned to swim", "trusted the new road", "liked the smell of paint",
    "missed a market day", "spoken about the journey", "thought of leaving", "owned a watch", "read the whole book",
)  # fmt: skip


def filler(random: Random) -> Iterator[str]:
    """Generated sentences of a village story, without end. They hold no digits."""
    while True:
        sentence = random.choice(_FRAMES).format(
            time=random.choice(_TIMES),
            person=random.choice(_PEOPLE),
            deed=random.choice(_DEEDS),
            thing=random.choice(_THINGS),
            place=random.choice(_PLACES),
            scene=random.choice(_SCENES),
            remark=random.choice(_REMARKS),
            experience=random.choice(_EXPERIENCES),
        )
        yield sentence[0].upper() + sentence[1:]


def passage(sentences: Sequence[str], random: Random) -> Iterator[str]:
    """Each of `sentences` once, in order from a random one on; the first follows the last."""
    start = random.randrange(len(sentences))
    for index in range(len(sentences)):
        yield sentences[(start + index) % len(sentences)]


def read_sentences(path: Path) -> tuple[str, ...]:
    """The sentences of a UTF-8 text file, or of all `*.txt` files of a directory in the order of their names.

    Raises EvaluationDataError if `path` is missing, unreadable, above 64 MiB, not UTF-8 or holds no sentence.
    """
    texts = []
    room = MAX_PROSE_BYTES
    for file in _text_files(path):
        data = _read(file, room)
        room -= len(data)
        texts.append(_decode(data, file))
    sentences = tuple(sentence for text in texts for sentence in split_sentences(text))
    if not sentences:
        raise EvaluationDataError(
            f"{path} holds no sentences",
            f"give prose whose sentences end with a full stop and have at most {MAX_SENTENCE_CHARACTERS} characters",
        )
    return sentences


def split_sentences(text: str) -> list[str]:
    """The sentences of `text` in order, with single spaces for all white space.

    What no mark ends (headings, cut-off ends of paragraphs) and what is too long for a sentence is left out.
    """
    return [
        sentence
        for paragraph in _PARAGRAPH_END.split(text.replace("\r\n", "\n"))
        for sentence in _paragraph_sentences(" ".join(paragraph.split()))
        if len(sentence) <= MAX_SENTENCE_CHARACTERS
    ]


def _paragraph_sentences(paragraph: str) -> Iterator[str]:
    start = 0
    for match in _SENTENCE_END.finditer(paragraph):
        # Only the end matters: a bounded piece keeps this linear in the paragraph's length.
        if not _ABBREVIATION.search(paragraph[max(start, match.end() - 10) : match.end()]):
            yield paragraph[start : match.end()].strip()
            start = match.end()


def _text_files(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
        files = sorted(file for file in path.iterdir() if file.suffix == ".txt" and file.is_file())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not files:
        raise EvaluationDataError(f"there is no .txt file in {path}", "name a text file or a directory of such files")
    return files


def _read(path: Path, room: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(room + 1)
    except FileNotFoundError:
        raise EvaluationDataError(f"there is no file {path}", "check the name given with `data`") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if len(data) > room:
        raise EvaluationDataError(
            f"with {path} the prose is larger than {MAX_PROSE_BYTES:,} bytes", "give a smaller part of it"
        )
    return data


def _unreadable(path: Path, error: OSError | ValueError) -> EvaluationDataError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return EvaluationDataError(f"cannot read {path}: {reason}", "check the file and its permissions")


def _decode(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error counts from behind the byte order mark, which has no line end.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise EvaluationDataError(
            f"{path}, line {line:,}: byte 0x{error.object[error.start]:02x} is not UTF-8", "save it as UTF-8"
        ) from None
    position = text.find("\0")
    if position >= 0:
        line = text.count("\n", 0, position) + 1
        raise EvaluationDataError(f"{path}, line {line:,}: a NUL byte, which no text has", "save it as UTF-8 text")
    return text
