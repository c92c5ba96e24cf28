"""ELF shared objects: read which symbols one wants, write one that has them. 64 bit, little endian, no compiler.

System V ABI, https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

SHT_DYNSYM, SHN_UNDEF = 11, 0
STB_GLOBAL, STT_FUNC = 1, 2
PT_LOAD, PT_DYNAMIC, PT_GNU_STACK = 1, 2, 0x6474E551
READ_EXECUTE, READ_WRITE = 5, 6
DT_NULL, DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14

MACHINES = {"x86_64": 62, "aarch64": 183}
RETURN_ZERO = {
    "x86_64": bytes.fromhex("31c0c3"),  # xor eax, eax; ret
    "aarch64": bytes.fromhex("00008052c0035fd6"),  # mov w0, #0; ret
}
HEADER, PROGRAM_HEADER, PROGRAM_HEADERS, SYMBOL = 64, 56, 4, 24
PAGE = 0x10000  # the largest page size of aarch64; it suits x86_64 also


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """Names in the dynamic symbol table of a shared object: (undefined and not weak, defined)."""
    undefined, defined = set(), set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, section, binding in _dynamic_symbols(data):
            if section != SHN_UNDEF:
                defined.add(name)
            elif binding == STB_GLOBAL:
                undefined.add(name)
    return undefined, defined


def _dynamic_symbols(data: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """(name, section index, binding) of every entry but the empty first one."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    for _, kind, _, _, start, length, strings, *_ in sections:
        if kind != SHT_DYNSYM:
            continue
        names = sections[strings][4]
        for at in range(start + SYMBOL, start + length, SYMBOL):
            name, info, _, section = struct.unpack_from("<IBBH", data, at)
            end = data.find(b"\0", names + name)
            yield data[names + name : end].decode(), section, info >> 4


def stub_library(soname: str, functions: Sequence[str], machine: str) -> bytes:
    """A shared object whose functions return 0.

    in the file:  headers | hash table | symbols | names | one function     loaded read and execute
                  dynamic section                                           loaded read and write

    Args:
        soname: the name under which the dynamic loader knows it once it is loaded.
        functions: names that all stand for the one function.
        machine: "x86_64" or "aarch64".
    """
    strings, offsets = _string_table([soname, *functions])
    hashes = _hash_table(functions)

    hash_at = HEADER + PROGRAM_HEADERS * PROGRAM_HEADER
    symbols_at = _align(hash_at + len(hashes), 8)
    strings_at = symbols_at + SYMBOL * (1 + len(functions))
    code_at = _align(strings_at + len(strings), 16)
    code_end = code_at + len(RETURN_ZERO[machine])
    dynamic_at = _align(code_end, PAGE)
    dynamic = _pairs(
        (DT_SONAME, offsets[soname]),
        (DT_HASH, hash_at),
        (DT_STRTAB, strings_at),
        (DT_SYMTAB, symbols_at),
        (DT_STRSZ, len(strings)),
        (DT_SYMENT, SYMBOL),
        (DT_NULL, 0),
    )
    entries = b"".join(_function(offsets[name], code_at, code_end - code_at) for name in functions)

    segments = (
        _segment(PT_LOAD, READ_EXECUTE, 0, code_end, PAGE),
        _segment(PT_LOAD, READ_WRITE, dynamic_at, len(dynamic), PAGE),
        _segment(PT_DYNAMIC, READ_WRITE, dynamic_at, len(dynamic), 8),
        _segment(PT_GNU_STACK, READ_WRITE, 0, 0, 16),
    )
    library = bytearray(dynamic_at + len(dynamic))
    for at, part in (
        (0, _header(MACHINES[machine]) + b"".join(segments)),
        (hash_at, hashes),
        (symbols_at, bytes(SYMBOL) + entries),
        (strings_at, strings),
        (code_at, RETURN_ZERO[machine]),
        (dynamic_at, dynamic),
    ):
        library[at : at + len(part)] = part
    return bytes(library)


def _header(machine: int) -> bytes:
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bit, little endian, version 1
    shared_object, version = 3, 1
    sizes = (HEADER, PROGRAM_HEADER, PROGRAM_HEADERS, 0, 0, 0)
    return identity + struct.pack("<HHIQQQIHHHHHH", shared_object, machine, version, 0, HEADER, 0, 0, *sizes)


def _segment(kind: int, flags: int, at: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, alignment)


def _function(name: int, address: int, size: int) -> bytes:
    some_section = 1  # any but "undefined": there is no section table
    return struct.pack("<IBBHQQ", name, STB_GLOBAL << 4 | STT_FUNC, 0, some_section, address, size)


def _string_table(names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    table, offsets = b"\0", {}
    for name in names:
        offsets[name] = len(table)
        table += name.encode() + b"\0"
    return table, offsets


def _hash_table(names: Sequence[str]) -> bytes:
    """The System V hash table; symbol 0 is the empty one."""
    buckets = [0] * max(1, len(names) // 2)
    chains = [0] * (1 + len(names))
    for number, name in enumerate(names, 1):
        bucket = _hash(name) % len(buckets)
        chains[number], buckets[bucket] = buckets[bucket], number
    words = [len(buckets), len(chains), *buckets, *chains]
    return struct.pack(f"<{len(words)}I", *words)


def _hash(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high & 0xFFFFFFFF
    return value


def _pairs(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", *pair) for pair in pairs)


def _align(offset: int, to: int) -> int:
    return -(-offset // to) * to
