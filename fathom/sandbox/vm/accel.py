"""How fast guests run here: by the processor's own virtualization where it works, else emulated.

Opening /dev/kvm proves nothing: on some machines it leads to a software form of it that no ordinary
kernel boots on. So the same guest that sandboxes use is booted with it, once per start of this
machine, and only one that reached its first process counts.

Paper: none (machine facts).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fathom.sandbox import agent
from fathom.sandbox.vm import emulator, kernel

# A guest with real virtualization is there in well under a second.
_PATIENCE = 5.0
_MARK = "fathom-guest-ran"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """`name`: "kvm" where a guest has really booted with it, else "tcg"; `reason`: how we know."""

    name: Literal["kvm", "tcg"]
    reason: str


def find(cache: Path) -> Accelerator:
    """Return what machines run with here, trying it out once per start of this machine.

    Raises SandboxError, Unsupported where there is no emulator at all.
    """
    found = emulator.find(cache)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = f"{boot} {found.version} {_access()}"
    note = cache / "vm" / "accelerator.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text())
        if known.pop("key") == key:
            return Accelerator(**known)
    result = _try(cache)
    fresh = note.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # it is only tried again the next time
        fresh.write_text(json.dumps({"key": key, **asdict(result)}))
        fresh.replace(note)
    return result


def _access() -> str:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _try(cache: Path) -> Accelerator:
    if problem := _access():
        return Accelerator("tcg", f"/dev/kvm cannot be opened ({problem})")
    guest = kernel.find(cache)
    initramfs = kernel.initramfs(guest, agent.binary(cache), cache)
    words = [emulator.need_program(), "-M", "microvm,acpi=on", "-accel", "kvm", "-cpu", "host"]
    words += ["-m", "128", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    words += ["-serial", "stdio", "-kernel", str(guest.image), "-initrd", str(initramfs)]
    words += ["-append", "console=ttyS0 quiet panic=-1 reboot=t fathom.probe"]
    with tempfile.TemporaryFile() as out:
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=_PATIENCE,
                check=False,
            )
            ended = f"the emulator ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"no guest had booted after {_PATIENCE:g} s"
        out.seek(0)
        said = out.read(1 << 16).decode(errors="replace")
    if _MARK in said:
        return Accelerator("kvm", "a guest booted with it")
    last = said.strip().splitlines()[-1:] or [""]
    return Accelerator("tcg", f"/dev/kvm opens, but {ended} {last[0][:200]}".strip())


def tsc_khz() -> int:
    """Return the rate of this processor's time stamp counter, 0 where it cannot be told.

    An emulated guest reads the same counter; one that measures its rate itself while others use
    the processor may find none and then stand still.
    """
    if os.uname().machine != "x86_64":
        return 0
    # rdtsc; shl rdx, 32; or rax, rdx; ret
    code = bytes.fromhex("0f3148c1e2204809d0c3")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        page = mmap.mmap(
            -1, mmap.PAGESIZE, flags, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
    except OSError:
        return 0
    page.write(code)
    place = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
    rates: list[float] = []
    for _ in range(5):
        began, first = time.perf_counter_ns(), read()
        time.sleep(0.01)
        ended, last = time.perf_counter_ns(), read()
        rates.append((last - first) * 1e6 / (ended - began))
    del read, place
    page.close()
    # Being interrupted between the two readings makes single values too large or too small.
    return round(sorted(rates)[len(rates) // 2])
