"""A loaded library seen from inside: where it keeps the addresses of functions that other libraries have."""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

_WORD = 8
_PAGE = mmap.PAGESIZE
_ELF_MAGIC = b"\x7fELF"
_ELF_64 = 2
_PT_LOAD, _PT_GNU_RELRO, _PF_W = 1, 0x6474E552, 2
_MACHO_MAGIC = struct.pack("<I", 0xFEEDFACF)
_LC_SEGMENT_64, _SG_READ_ONLY = 0x19, 0x10
_PROT_READ, _PROT_WRITE = 1, 2
# VM_PROT_COPY: a page shared with other processes is copied when it is made writable.
_VM_PROT_COPY = 0x10


class PointerError(Exception):
    """Why the place of a pointer is not known, or cannot be written."""


@dataclass(frozen=True)
class Region:
    """Memory of a library that was writable when it was loaded; `read_only` says that it is so no more."""

    start: int
    size: int
    read_only: bool


class _DlInfo(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


class Pointer:
    """The one word in a library's memory that holds the address of a function of another library."""

    def __init__(self, member: Any, function: Any) -> None:
        """`member` is any function of the library, `function` the one that it calls (both ctypes functions).

        Raises PointerError unless exactly one word holds its address.
        """
        if ctypes.sizeof(ctypes.c_void_p) != _WORD or sys.platform == "win32":
            raise PointerError("only known for 64-bit ELF and Mach-O libraries")
        self.function: int = address_of(function)
        found = [
            (place, region.read_only)
            for region in regions(_base(address_of(member)))
            for place in _places(region, self.function)
        ]
        if len(found) != 1:
            raise PointerError(f"{len(found)} places hold the function's address where one was expected")
        ((self.place, self._read_only),) = found

    def read(self) -> int:
        """The address that the word holds."""
        return int(ctypes.c_uint64.from_address(self.place).value)

    def write(self, address: int) -> None:
        """Let the word hold `address`; the page is as writable afterwards as it was. Raises PointerError."""
        if self._read_only:
            _protect(self.place, writable=True)
        try:
            # One aligned store: a thread that calls the function meanwhile finds the old address or the new one.
            ctypes.c_uint64.from_address(self.place).value = address
        finally:
            if self._read_only:
                _protect(self.place, writable=False)


def address_of(function: Any) -> int:
    """The address of a ctypes function or callback."""
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def regions(base: int) -> Iterator[Region]:
    """The memory of the library whose header lies at `base` in which its pointers can be.

    ELF: program headers (System V ABI, chapter 5); the dynamic linker takes the right to write from the whole pages
    of PT_GNU_RELRO. Mach-O: segment commands (mach-o/loader.h). Raises PointerError for another kind of file.
    """
    magic = ctypes.string_at(base, 5)
    if magic == _ELF_MAGIC + bytes([_ELF_64]):
        return _elf_regions(base)
    if magic[:4] == _MACHO_MAGIC:
        return _macho_regions(base)
    raise PointerError("libllama is neither a 64-bit ELF nor a 64-bit Mach-O library")


def _elf_regions(base: int) -> Iterator[Region]:
    (table,) = struct.unpack("=Q", ctypes.string_at(base + 32, 8))
    entry_size, count = struct.unpack("=HH", ctypes.string_at(base + 54, 4))
    # type, flags, offset, virtual address, physical address, size in the file, size in memory
    headers = [struct.unpack("=IIQQQQQ", ctypes.string_at(base + table + i * entry_size, 48)) for i in range(count)]
    lowest = min(header[3] for header in headers if header[0] == _PT_LOAD)
    slide = base - lowest // _PAGE * _PAGE
    relro = [(slide + header[3], slide + header[3] + header[6]) for header in headers if header[0] == _PT_GNU_RELRO]
    locked = [(start // _PAGE * _PAGE, end // _PAGE * _PAGE) for start, end in relro]
    for kind, flags, _, virtual, _, _, size in headers:
        if kind == _PT_LOAD and flags & _PF_W:
            yield from _cut(slide + virtual, slide + virtual + size, locked)


def _cut(start: int, end: int, locked: list[tuple[int, int]]) -> Iterator[Region]:
    """A segment in pieces that are wholly read-only or wholly writable."""
    edges = sorted({start, end, *(edge for pair in locked for edge in pair if start < edge < end)})
    for low, high in pairwise(edges):
        yield Region(low, high - low, any(first <= low < last for first, last in locked))


def _macho_regions(base: int) -> Iterator[Region]:
    count, _ = struct.unpack("<II", ctypes.string_at(base + 16, 8))
    place = base + 32
    segments = []
    for _ in range(count):
        command, size = struct.unpack("<II", ctypes.string_at(place, 8))
        if command == _LC_SEGMENT_64:
            # name, virtual address and size, offset and size in the file, largest and first protection, sections, flags
            fields = struct.unpack("<16sQQQQiiII", ctypes.string_at(place + 8, 64))
            segments.append((fields[0].rstrip(b"\0"), fields[1], fields[2], fields[6], fields[8]))
        place += size
    slide = next(base - virtual for name, virtual, *_ in segments if name == b"__TEXT")
    for _, virtual, size, protection, flags in segments:
        if protection & _PROT_WRITE:
            yield Region(slide + virtual, size, bool(flags & _SG_READ_ONLY))


def _base(member: int) -> int:
    """Where the library begins that has a function at address `member`."""
    try:
        find = ctypes.CDLL(None).dladdr
    except (AttributeError, OSError, TypeError):
        raise PointerError("this system does not tell where a library lies (dladdr)") from None
    find.restype, find.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    info = _DlInfo()
    if not find(member, ctypes.byref(info)) or not info.dli_fbase:
        raise PointerError("libllama is not found in memory")
    return int(info.dli_fbase)


def _places(region: Region, address: int) -> list[int]:
    """Where the region holds the word `address`."""
    skip = -region.start % _WORD
    count = (region.size - skip) // _WORD
    if count <= 0:
        return []
    words = np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(region.start + skip))
    return [region.start + skip + _WORD * int(index) for index in np.nonzero(words == address)[0]]


def _protect(place: int, *, writable: bool) -> None:
    """Give or take the right to write to the page of `place`."""
    page = place // _PAGE * _PAGE
    library = ctypes.CDLL(None, use_errno=True)
    change: Callable[..., int]
    if sys.platform == "darwin":
        protection = _PROT_READ | (_PROT_WRITE | _VM_PROT_COPY if writable else 0)
        change = library.vm_protect
        change.argtypes = [ctypes.c_uint, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        failed = change(ctypes.c_uint.in_dll(library, "mach_task_self_").value, page, _PAGE, 0, protection)
    else:
        protection = _PROT_READ | (_PROT_WRITE if writable else 0)
        change = library.mprotect
        change.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        failed = change(page, _PAGE, protection)
    if failed:
        raise PointerError("the system does not allow to write there")
