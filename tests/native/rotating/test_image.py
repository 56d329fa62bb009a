from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from pathlib import Path

import llama_cpp.llama_cpp as llama
import pytest

from abcli.native import ggml_api as api
from abcli.native.rotating import image
from abcli.native.rotating.image import Pointer, PointerError, Region, address_of, regions

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def permissions(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= address < end:
            return rights
    raise AssertionError(hex(address))


def libllama() -> list[Region]:
    return list(regions(image._base(address_of(llama._lib.llama_decode))))


def function_at(address: int) -> ctypes._CFuncPtr:
    return ctypes.CFUNCTYPE(None)(address)


def test_the_place_of_a_function_is_found_and_holds_its_address() -> None:
    pointer = Pointer(llama._lib.llama_decode, api.rope)
    assert pointer.read() == address_of(api.rope)
    pointer.write(pointer.function)
    assert pointer.read() == pointer.function


@linux
def test_regions_are_as_writable_as_the_system_says() -> None:
    found = libllama()
    assert {region.read_only for region in found} == {True, False}
    for region in found:
        for address in (region.start, region.start + region.size - 1):
            assert permissions(address)[1] == ("-" if region.read_only else "w")


@linux
def test_a_read_only_page_is_read_only_again_after_writing() -> None:
    region = next(region for region in libllama() if region.read_only)
    words = (ctypes.c_uint64 * (region.size // 8)).from_address(region.start + -region.start % 8)
    value = next(word for word in words if word and list(words).count(word) == 1)
    pointer = Pointer(llama._lib.llama_decode, function_at(value))
    before = permissions(pointer.place)
    pointer.write(value + 1)
    assert pointer.read() == value + 1
    assert permissions(pointer.place) == before == "r--p"
    pointer.write(value)
    assert pointer.read() == value


def test_a_function_that_the_library_does_not_call_is_not_found() -> None:
    with pytest.raises(PointerError, match="0 places"):
        Pointer(llama._lib.llama_decode, function_at(0x1234567))


def test_another_kind_of_file_is_refused() -> None:
    memory = mmap.mmap(-1, 4096)
    with pytest.raises(PointerError, match="neither"):
        regions(ctypes.addressof(ctypes.c_char.from_buffer(memory)))


def test_the_segments_of_a_mach_o_library_are_read() -> None:
    def segment(name: bytes, virtual: int, size: int, protection: int, flags: int) -> bytes:
        fields = struct.pack("<16sQQQQiiII", name, virtual, size, 0, size, protection, protection, 0, flags)
        return struct.pack("<II", 0x19, 8 + len(fields)) + fields

    other = struct.pack("<II", 0x1B, 24) + bytes(16)
    commands = [
        segment(b"__TEXT", 0x1000, 0x4000, 5, 0),
        other,
        segment(b"__DATA_CONST", 0x5000, 0x1000, 3, 0x10),
        segment(b"__DATA", 0x6000, 0x2000, 3, 0),
        segment(b"__LINKEDIT", 0x8000, 0x1000, 1, 0),
    ]
    header = struct.pack("<IiiIIIII", 0xFEEDFACF, 0x0100000C, 0, 6, len(commands), sum(map(len, commands)), 0, 0)
    memory = ctypes.create_string_buffer(header + b"".join(commands))
    base = ctypes.addressof(memory)
    assert list(regions(base)) == [Region(base + 0x4000, 0x1000, True), Region(base + 0x5000, 0x2000, False)]
