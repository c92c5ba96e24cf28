"""CANN's shared libraries as stubs in memory: enough for the dynamic loader to accept torch_npu, and no more.

The real torch_npu asks the loader for nine libraries by name and for their symbols. A library that is loaded already
answers for its SONAME, so the stubs are written to anonymous memory files and loaded first. Their functions return 0
(success, and for a count: none), so torch_npu finds no device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
from pathlib import Path

from cppass.errors import CPError
from lowering.cann_host.elf import MACHINES, stub_library, symbols

SONAMES = (  # DT_NEEDED of torch_npu's own libraries that only CANN has; seen in torch_npu 2.13.0
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libfmk_parser.so",
    "libacl_tdt_channel.so",
    "libascend_protobuf.so",
    "libatb.so",
)
# The 190 symbols seen in torch_npu 2.13.0, all functions: the C interfaces of ACL, HCCL, the profiler and the runtime,
# C++ of the namespaces ge and atb, and CANN's own bounded C functions (strcpy_s). Not what torch or libc has.
CANN_SYMBOL = re.compile(r"acl[A-Za-z]|Hccl|Hcom|Msprof|rt[A-Z]|_ZNK?(2ge|3atb)|\w+_s$")


def load_stubs() -> None:
    """Load the nine stub libraries into this process, for all that is loaded later to see.

    Raises:
        CPError: CP504, this machine is of a kind that no stub can be written for, or its loader refuses them.
    """
    machine = platform.machine()
    if machine not in MACHINES or not hasattr(os, "memfd_create"):
        raise CPError(
            "CP504",
            f"torch_npu without CANN needs Linux on {' or '.join(MACHINES)}; this is {platform.system()} on {machine}",
            "install CANN, or use the host target, which needs no torch_npu",
        )
    wanted = wanted_symbols()
    files: list[int] = []
    try:
        for number, soname in enumerate(SONAMES):
            library = stub_library(soname, () if number else wanted, machine)  # the first has them all
            files.append(os.memfd_create(soname))
            os.write(files[-1], library)
            ctypes.CDLL(f"/proc/self/fd/{files[-1]}", mode=ctypes.RTLD_GLOBAL | os.RTLD_NOW)
    except OSError as error:
        raise CPError(
            "CP504",
            f"the stub of {soname} cannot be loaded: {error}",
            "allow memory files to be executed, or use the host target",
        ) from error
    finally:
        for file in files:  # only now: the loader takes a reused descriptor's path for a library it has
            os.close(file)


def wanted_symbols() -> list[str]:
    """CANN's symbols that the installed torch_npu has undefined, sorted."""
    undefined: set[str] = set()
    defined: set[str] = set()
    for path in _torch_npu().rglob("*.so"):
        wants, has = symbols(path)
        undefined |= {name for name in wants if CANN_SYMBOL.match(name)}
        defined |= has
    return sorted(undefined - defined)


def _torch_npu() -> Path:
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise CPError("CP504", "torch_npu is not installed", 'pip install "cppass[npu-host]"')
    return Path(spec.origin).parent
