"""What the assembler made of a kernel's asynchronous matrix instructions, read from its listing.

On Hopper such an instruction (HGMMA) goes on after it was issued: until a wait for it, the
registers of its sum and, where it comes from registers, of its left operand belong to it. Neither
Triton nor the assembler promises that; a listing shows whether it holds.

Kernels are compiled for compute capability 9.0 without a device: launches are recorded and not
performed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fathom.kernels.triton.ahead import Launch

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.float64: "fp64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Za-z0-9_.]+)\s*([^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")
MATRIX = re.compile(r"[HQI]GMMA\.64x(\d+)x\d+\.(F32|F16|S32)")
MEMORY = ("LD", "ST", "ATOM", "RED", "UTMA", "UBLKCP")


def compiled(launch: Launch) -> Any:
    """The kernel as it is compiled for compute capability 9.0."""
    kernel, keywords = launch.kernel, dict(launch.keywords)
    options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
    values = dict(zip((p.name for p in kernel.params), launch.arguments, strict=False)) | keywords
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, p in enumerate(kernel.params):
        value, name = values.get(p.name, p.default), p.name
        aligned = isinstance(value, torch.Tensor)
        if p.is_constexpr or (type(value) is int and value == 1 and not p.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif type(value) is int:
            signature[name] = "i32"
            aligned = value % 16 == 0 and not p.do_not_specialize
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:  # a tensor descriptor
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def listing(kernel: Any) -> str:
    """The machine code of what `compiled` returned, disassembled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True, timeout=60
        )
    return done.stdout


@dataclass(frozen=True, slots=True)
class Instruction:
    """address: in bytes; guarded: under a predicate; code: with suffixes; operands: as printed."""

    address: int
    guarded: bool
    code: str
    operands: str

    @property
    def written(self) -> set[int]:
        """Registers that it writes, those of a matrix instruction left out."""
        first = self.operands.split(",")[0].strip()
        found = re.fullmatch(r"R(\d+)", first)
        if not found or self.code.startswith(("ST", "RED")):
            return set()
        number, count = int(found[1]), 1
        if ".128" in self.code or re.search(r"M88\.4|MT88\.4", self.code):
            count = 4
        elif ".64" in self.code or ".WIDE" in self.code or re.search(r"M88\.2", self.code):
            count = 2
        return set(range(number, number + count))

    @property
    def read(self) -> set[int]:
        """Registers that it reads, as far as their numbers are printed."""
        parts = self.operands.split(",")
        rest = parts if self.code.startswith(("ST", "RED")) else parts[1:]
        return {int(n) for part in rest for n in REGISTER.findall(part)}


@dataclass(frozen=True, slots=True)
class Flight:
    """A matrix instruction that was issued and not yet waited for."""

    address: int
    sums: frozenset[int]
    operand: frozenset[int]


@dataclass(slots=True)
class Findings:
    """matrix: matrix instructions seen; touched: instructions that touch registers of one under
    way; memory: accesses to memory while one is under way, before which a tool that instruments
    accesses saves and after which it restores those registers; spills: loads and stores of
    registers that were spilled; registers: of a thread.
    """

    matrix: int
    touched: set[str]
    memory: set[str]
    spills: int
    registers: int


def instructions(text: str) -> list[Instruction]:
    """Those of a listing, in order of address."""
    return [Instruction(int(a, 16), bool(p), c, o.strip()) for a, p, c, o in LINE.findall(text)]


def examine(text: str) -> Findings:
    """Follow every path through a listing with what is under way on it."""
    code = instructions(text)
    index = {i.address: n for n, i in enumerate(code)}
    found = Findings(
        matrix=sum(bool(MATRIX.match(i.code)) for i in code),
        touched=set(),
        memory=set(),
        spills=sum(i.code.startswith(("LDL", "STL")) for i in code),
        registers=1 + max(int(n) for i in code for n in REGISTER.findall(f"R0 {i.operands}")),
    )
    seen: set[tuple[int, tuple[Flight, ...]]] = set()
    paths: list[tuple[int, tuple[Flight, ...]]] = [(0, ())]
    targets = {_target(i) for i in code} - {None}
    while paths:
        at, under_way = paths.pop()
        while at < len(code):
            own = code[at]
            if own.address in targets or own.code.startswith("BRA"):
                if (at, under_way) in seen:
                    break
                seen.add((at, under_way))
            under_way = _step(own, under_way, found)
            target = _target(own)
            if target is not None and target in index:
                paths.append((index[target], under_way))
            if own.code in ("EXIT", "BRA") and not own.guarded and "P" not in own.operands:
                break
            at += 1
    return found


def _target(own: Instruction) -> int | None:
    if not own.code.startswith("BRA"):
        return None
    found = re.search(r"0x([0-9a-f]+)", own.operands)
    return int(found[1], 16) if found else None


def _step(own: Instruction, under_way: tuple[Flight, ...], found: Findings) -> tuple[Flight, ...]:
    matrix = MATRIX.match(own.code)
    if own.code.startswith("WARPGROUP.DEPBAR"):
        left = int(re.findall(r"0x([0-9a-f]+)", own.operands)[-1], 16)
        return under_way[len(under_way) - left :] if left else ()
    if matrix:
        parts = [part.strip() for part in own.operands.split(",")]
        first = int(REGISTER.findall(parts[0])[0])
        count = int(matrix[1]) // (4 if matrix[2] == "F16" else 2)
        operand = REGISTER.match(parts[1])
        registers = range(int(operand[1]), int(operand[1]) + 4) if operand else ()
        sums = frozenset(range(first, first + count))
        for other in under_way:
            # A sum may be continued; an operand must not be another's sum.
            if other.sums & set(registers) or (other.sums & sums and other.sums != sums):
                found.touched.add(_said(own, other))
        return (*under_way, Flight(own.address, sums, frozenset(registers)))
    for other in under_way:
        if own.written & (other.sums | other.operand) or own.read & other.sums:
            found.touched.add(_said(own, other))
    if under_way and own.code.startswith(MEMORY):
        found.memory.add(f"{own.address:#x} {own.code} while {under_way[-1].address:#x} runs")
    return under_way


def _said(own: Instruction, other: Flight) -> str:
    return f"{own.address:#x} {own.code} {own.operands} while {other.address:#x} runs"
