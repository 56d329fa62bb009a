"""What a model's name on the hub means, and which files of a repository it stands for; pure, no disk and no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from abcli.errors import ModelFileError, UsageError

DEFAULT_QUANT = "Q4_K_M"
# Taken in this order when a name says no quant: near 4 bits first, then larger, then smaller, then unquantised files.
QUANT_ORDER = (
    *(DEFAULT_QUANT, "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q4_K_L", "Q4_K_XL", "UD-Q4_K_XL", "MXFP4"),
    *("Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "UD-Q5_K_XL", "Q6_K", "UD-Q6_K_XL", "Q3_K_L", "Q3_K_M", "Q3_K_S"),
    *("Q8_0", "F16", "BF16", "F32", "IQ3_M", "Q2_K"),
)
# ":latest" is what ollama's users write for no wish at all; llama.cpp takes it so, too.
_OTHER_SPELLINGS = {"FP16": "F16", "FP32": "F32", "LATEST": ""}
SCHEME = "hf:"
# A name could claim 99,999 of them.
MAX_PARTS = 1000

_HINT = "write user/repository, user/repository:Q4_K_M or user/repository/file.gguf"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REPOSITORY = rf"{_PART}/{_PART}"
_REVISION = r"[A-Za-z0-9._-]+"
_NAME = re.compile(
    rf"(?P<repository>{_REPOSITORY})(?:@(?P<revision>{_REVISION}))?"
    r"(?::(?P<quant>[A-Za-z0-9][A-Za-z0-9._-]*)|/(?P<file>.+\.gguf))?",
    re.IGNORECASE,
)
# A page or a download link of one file, or the page of a repository.
_WEB = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/"
    rf"(?P<repository>{_REPOSITORY})/?"
    r"(?:(?:resolve|blob|tree|raw)/(?P<revision>[^/?#]+)/?(?P<file>[^?#]*))?(?:[?#].*)?"
)
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
# The quants that file names carry: Q4_K_M, IQ4_XS, UD-Q4_K_XL, TQ1_0, MXFP4, BF16, F16, fp16.
_QUANT_WORD = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q|TQ)\d(?:_[A-Z0-9]+)*|MXFP4|BF16|FP?16|FP?32)(?![A-Za-z0-9_])", re.IGNORECASE
)
# Files in GGUF that are no model by themselves.
_COMPANION = re.compile(r"mmproj|imatrix", re.IGNORECASE)


def hub_word(name: str) -> str:
    """`name`, written so that it means a model of the hub, whatever else has it."""
    return name if names_hub(name) else f"{SCHEME}{name}"


@dataclass(frozen=True)
class HubName:
    """A model on the hub: a repository, and what is wanted from it; "" where the name does not say."""

    repository: str
    quant: str = ""
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        """The name as it can be typed."""
        revision = f"@{self.revision}" if self.revision else ""
        rest = f"/{self.file}" if self.file else f":{self.quant}" if self.quant else ""
        return f"{self.repository}{revision}{rest}"


def parse_hub_name(text: str) -> HubName | None:
    """The model that `text` names on the hub, None if it does not have the form of such a name.

    Read are user/repository[@revision][:quant], user/repository[@revision]/file.gguf, the same after "hf:", "hf://"
    or "hf.co/", and links to huggingface.co. The quant is in capitals. Whether a file of that path exists is not
    asked. Raises UsageError for text that can only be meant for the hub and is not such a name.
    """
    if "://" in text and not text.lower().startswith("hf://"):
        return _from_link(text)
    rest, forced = _without_prefix(text)
    match = _NAME.fullmatch(rest)
    if match is None or ".." in rest:
        if forced:
            raise UsageError(f"{text!r:.200} is not the name of a model on the hub", _HINT)
        return None
    file = match["file"] or ""
    if not forced and not file and match["quant"] is None and rest.lower().endswith(".gguf"):
        return None  # folder/file.gguf
    return HubName(match["repository"], normal_quant(match["quant"] or ""), file, match["revision"] or "")


def is_quant(word: str) -> bool:
    """Whether `word` is a known form of quant, such as Q4_K_M."""
    return _QUANT_WORD.fullmatch(word) is not None


def names_hub(text: str) -> bool:
    """Whether `text` says by its first letters that it means the hub."""
    return _without_prefix(text)[1] or text.lower().startswith(("https://huggingface.co/", "https://hf.co/"))


def _without_prefix(text: str) -> tuple[str, bool]:
    for prefix in ("hf://", SCHEME, "hf.co/", "huggingface.co/"):
        if text.lower().startswith(prefix):
            return text[len(prefix) :], True
    return text, False


def _from_link(text: str) -> HubName:
    match = _WEB.fullmatch(text)
    file = unquote(match["file"] or "") if match is not None else ""
    if match is None or ".." in text or (file and not file.lower().endswith(".gguf")):
        raise UsageError(f"{text!r:.200} is not a link to a GGUF model on huggingface.co", _HINT)
    revision = unquote(match["revision"] or "")
    return HubName(match["repository"], "", file, "" if revision == "main" else revision)


def normal_quant(quant: str) -> str:
    """A quant in capitals, in its usual spelling: "q4_k_m" is "Q4_K_M", "fp16" is "F16"."""
    upper = quant.upper()
    return _OTHER_SPELLINGS.get(upper, upper)


def quant_of(path: str) -> str:
    """The quant that a file's name says, in its usual spelling; else its folder's, else ""."""
    for part in reversed(path.split("/")):
        if found := _QUANT_WORD.findall(part):
            return normal_quant(found[-1])
    return ""


def models_among(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The models among the files of a repository, by the path of their first part, each with all its parts in order.

    What is no model by itself (mmproj, imatrix) and split models that lack parts are left out.
    """
    found: dict[str, tuple[str, ...]] = {}
    there = set(paths)
    for path in sorted(there):
        if not path.lower().endswith(".gguf") or _COMPANION.search(path.rpartition("/")[2]):
            continue
        parts = parts_of(path)
        if parts[0] == path and there.issuperset(parts):
            found[path] = parts
    return found


def parts_of(path: str) -> tuple[str, ...]:
    """All parts of the split model that `path` is a part of, in order; just `path` for any other file."""
    match = _SPLIT.fullmatch(path)
    count = int(match["count"]) if match is not None else 0
    if match is None or not 1 <= count <= MAX_PARTS:
        return (path,)
    return tuple(f"{match['stem']}-{number:05d}-of-{count:05d}{path[-5:]}" for number in range(1, count + 1))


def choose_files(name: HubName, paths: Sequence[str]) -> tuple[str, ...]:
    """The files that `name` stands for among `paths`, all files of its repository: one, or the parts of one model.

    A quant has to stand in the file's name as a word. Without one it is Q4_K_M, or else the first of `QUANT_ORDER`
    that there is. Raises ModelFileError, with what there is, if nothing or more than one model fits.
    """
    if name.file:
        parts = parts_of(name.file)
        missing = [part for part in parts if part not in set(paths)]
        if missing:
            raise ModelFileError(f"{name.repository} has no file {missing[0]!r:.200}", _there_are(paths))
        return parts
    models = models_among(paths)
    if not models:
        raise ModelFileError(
            f"{name.repository} has no GGUF file", "look for a repository of the same model whose name ends in -GGUF"
        )
    wanted = [name.quant] if name.quant else _by_preference(models)
    for quant in wanted:
        fitting = [first for first in models if _says(first, quant)]
        if len(fitting) == 1:
            return models[fitting[0]]
        if fitting:
            raise ModelFileError(
                f"{name.repository} has {len(fitting)} models" + (f" in {quant}" if quant else ""),
                f"name one of them: {_listed(f'{name.repository}/{first}' for first in fitting)}",
            )
    raise ModelFileError(f"{name.repository} has no file in {name.quant}", _there_are(paths))


def _says(path: str, quant: str) -> bool:
    """Whether `quant` is a word of the path; "" is that of a path with no known quant in it."""
    if not quant:
        return not quant_of(path)
    if quant_of(path) == quant:
        return True
    # UD-Q4_K_XL is not Q4_K_XL: a quant that is known is taken as a whole.
    word = rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])"
    return not is_quant(quant) and re.search(word, path, re.IGNORECASE) is not None


def _by_preference(models: Iterable[str]) -> list[str]:
    quants = {quant_of(first) for first in models}
    rank = {quant: number for number, quant in enumerate(QUANT_ORDER)}
    return sorted(quants, key=lambda quant: (rank.get(quant, len(rank)), quant == "", quant))


def _there_are(paths: Iterable[str]) -> str:
    models = models_among(paths)
    quants = sorted({quant_of(first) for first in models} - {""})
    if quants and all(quant_of(first) for first in models):
        return f"there are: {_listed(quants)}"
    return f"there are: {_listed(models)}" if models else "it has no GGUF file at all"


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:30]) + (f" and {len(words) - 30} more" if len(words) > 30 else "")
