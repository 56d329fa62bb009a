"""All checks of a model file that need no llama.cpp, one by one, so that a person sees what was looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from abcli.config import LoraConfig, ModelConfig
from abcli.errors import AbcliError, ModelFileError
from abcli.gguf.check import (
    check_file,
    check_integrity,
    check_kind_of_file,
    check_kind_of_model,
    check_part,
    check_weights,
    split_paths,
)
from abcli.gguf.checked import CheckedModel
from abcli.gguf.cursor import FETCH_AGAIN
from abcli.gguf.description import special_tokens
from abcli.gguf.header import Header, TensorInfo, read_header
from abcli.gguf.header_checks import check_embeddings, check_hyperparameters, check_tensor_types, check_tokenizer
from abcli.gguf.lora import (
    Adapter,
    check_adapters,
    check_kind_of_adapter,
    described_adapter,
    is_adapter,
    read_adapter,
)
from abcli.gguf.weights import Scan, check_finite
from abcli.text import counted

Status = Literal["ok", "failed", "skipped"]
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Check:
    """The outcome of one check: what was looked at and found, or what is wrong and what to do about it."""

    name: str
    status: Status
    detail: str
    hint: str = ""


class Verification:
    """Runs checks in turn; what a failed one was needed for is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header | None = None
        self.adapters: tuple[Adapter, ...] = ()
        self._files: tuple[Header, ...] = ()
        self._sound = True
        self._readable = True

    @property
    def is_adapter(self) -> bool:
        """Whether the file is an adapter and not a model, as far as that is known."""
        return self.header is not None and is_adapter(self.header)

    @property
    def sound(self) -> bool:
        """Whether no check has failed so far."""
        return self._sound

    def run(self, name: str, job: Callable[[], str], *, needs_header: bool = False) -> Check:
        """The outcome of `job`, which gives the detail and raises AbcliError for what is wrong."""
        if needs_header and self.header is None:
            return Check(name, "skipped", "the header cannot be read")
        try:
            return Check(name, "ok", job())
        except AbcliError as error:
            self._sound = False
            return Check(name, "failed", error.message, error.hint)

    def structure(self) -> Iterator[Check]:
        """The file, its header and everything the header says."""
        yield self.run("file", self._file)
        yield self.run("header", self._header)
        steps: tuple[tuple[str, Callable[[Header], str]], ...] = self._adapter_steps() or (
            ("tensor data", self._layout),
            ("parts", self._parts),
            ("kind of model", self._kind),
            ("hyperparameters", self._hyperparameters),
            ("tensor types", self._types),
            ("tokenizer", self._tokenizer),
            ("embeddings", self._embeddings),
            ("all together", self._together),
        )
        for name, step in steps:
            yield self.run(name, lambda step=step: step(self._known()), needs_header=True)  # type: ignore[misc]
        self._readable = self._sound

    def _adapter_steps(self) -> tuple[tuple[str, Callable[[Header], str]], ...]:
        """The steps for a file that is an adapter; none for any other."""
        if not self.is_adapter:
            return ()
        return (
            ("tensor data", self._layout),
            ("kind of adapter", self._kind_of_adapter),
            ("matrices", lambda header: _matrices(described_adapter(header))),
            (
                "all together",
                lambda header: _matrices(read_adapter(header.path)) and "abcli would load it with its model",
            ),
        )

    def adapter(self, lora: LoraConfig) -> Iterator[Check]:
        """Whether an adapter fits the model, which counts as changed by it from then on."""
        name = lora.path.name
        if not self._readable or self.header is None:
            yield Check(f"lora {name}", "skipped", "the model is damaged")
            return
        fit = self.run(f"lora {name}", lambda: self._fit(lora))
        yield fit
        if fit.status == "ok":
            yield self.run(f"weights of {name}", lambda: _finite(check_finite([read_header(lora.path)])))

    def checksums(
        self,
        expected: Mapping[str, str],
        known: Mapping[str, str],
        on_bytes: Callable[[int], None] | None = None,
    ) -> Iterator[Check]:
        """SHA-256 of each file; all in lower-case hex.

        `expected` has what it must be by the name of the file; `known` says by digest what a file without that is.
        """
        for path in self.paths():
            yield self.run(
                f"sha-256 of {path.name}",
                lambda path=path: _checksum(path, expected.get(path.name), known, on_bytes),  # type: ignore[misc]
            )

    def weights(self, on_bytes: Callable[[int], None] | None = None) -> Check:
        """Whether all weights, or the scales of their blocks, are finite numbers."""
        if self.header is not None and not self._readable:
            return Check("weights", "skipped", "a check of the structure has failed")
        return self.run("weights", lambda: self._weights(on_bytes), needs_header=True)

    def checked(self) -> CheckedModel | None:
        """The model with the adapters that fit it; None if a check has failed."""
        if not self._files or not self._sound:
            return None
        return CheckedModel(ModelConfig(self.path), self._files[0], self._files[1:], self.adapters)

    def paths(self) -> tuple[Path, ...]:
        """All files of the model, as far as they are known."""
        if self.header is None:
            return (self.path,)
        try:
            return split_paths(self.header)
        except ModelFileError:
            return (self.path,)

    @property
    def _tensors(self) -> list[TensorInfo]:
        return [tensor for file in self._files for tensor in file.tensors]

    def _known(self) -> Header:
        if self.header is None:
            raise RuntimeError("the header has not been read")
        return self.header

    def _file(self) -> str:
        check_kind_of_file(self.path)
        return f"{self.path.stat().st_size:,} bytes"

    def _header(self) -> str:
        check_kind_of_file(self.path)
        self.header = header = read_header(self.path)
        counts = f"{counted(len(header.metadata), 'key')}, {counted(len(header.tensors), 'tensor')}"
        return f"GGUF version {header.version}, {counts}"

    def _layout(self, header: Header) -> str:
        check_integrity(header)
        return f"{sum(tensor.size_bytes for tensor in header.tensors):,} bytes without gap or overlap"

    def _parts(self, header: Header) -> str:
        self._files = (header, *(check_part(part, header) for part in split_paths(header)[1:]))
        count = len(self._files)
        return "a single file" if count == 1 else f"{count} files, {counted(len(self._tensors), 'tensor')}"

    def _kind(self, header: Header) -> str:
        check_kind_of_model(header)
        return f"{header.architecture}, a model that writes text"

    def _kind_of_adapter(self, header: Header) -> str:
        check_kind_of_adapter(header)
        return f"a LoRA for {header.architecture}"

    def _fit(self, lora: LoraConfig) -> str:
        self.adapters += check_adapters(self._files, [lora])
        return f"{_matrices(read_adapter(lora.path))}, which fit; counted {lora.scale:g} times"

    def _hyperparameters(self, header: Header) -> str:
        check_hyperparameters(header)
        return f"{counted(header.layers, 'layer')} of {header.embedding_length} dimensions"

    def _types(self, header: Header) -> str:
        check_weights(header, self._tensors)
        check_tensor_types(header, self._tensors)
        return ", ".join(sorted({tensor.type_name for tensor in self._tensors}))

    def _tokenizer(self, header: Header) -> str:
        check_tokenizer(header)
        outside = [f"{token.role} {token.token}" for token in special_tokens(header) if token.text is None]
        note = f"; llama.cpp ignores what lies outside: {', '.join(outside)}" if outside else ""
        return f"{header.vocabulary_size:,} tokens{note}"

    def _embeddings(self, header: Header) -> str:
        check_weights(header, self._tensors)
        check_embeddings(header, self._tensors)
        return f"{header.vocabulary_size:,} rows"

    def _together(self, header: Header) -> str:
        """What abcli checks before it loads a model: nothing may pass here that is refused there."""
        check_file(header.path)
        return "abcli would load it"

    def _weights(self, on_bytes: Callable[[int], None] | None) -> str:
        return _finite(check_finite([read_header(path) for path in self.paths()], on_bytes))


def _finite(scans: Iterable[Scan]) -> str:
    scanned, skipped = (sum(counts) for counts in zip(*((scan.scanned, scan.skipped) for scan in scans), strict=True))
    note = f"; {skipped:,} bytes of a type without plain scales were left out" if skipped else ""
    return f"{scanned:,} bytes hold finite numbers{note}"


def _matrices(adapter: Adapter) -> str:
    ranks = " and ".join(str(rank) for rank in adapter.ranks)
    return f"{counted(len(adapter.pairs), 'pair')} of matrices of rank {ranks}"


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in lower-case hex. Raises ModelFileError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
                if on_bytes is not None:
                    on_bytes(len(data))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(f"cannot read {path}: {reason}", "check the path and its permissions") from error
    return digest.hexdigest()


def _checksum(path: Path, wanted: str | None, known: Mapping[str, str], on_bytes: Callable[[int], None] | None) -> str:
    check_kind_of_file(path)  # a named pipe would never end
    found = file_sha256(path, on_bytes)
    if wanted is None:
        return f"{found} ({known.get(found, 'nothing to compare it with')})"
    if found != wanted:
        raise ModelFileError(f"{path.name} has the SHA-256 {found} instead of {wanted}", FETCH_AGAIN)
    return f"{found}, as expected"
