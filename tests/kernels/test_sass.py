"""Matrix instructions run on after they were issued: nothing may touch their registers meanwhile.

Kernels that use Hopper's asynchronous matrix instructions are compiled for that card, which needs
no device, and their listings followed along every path. It happens in a process of its own, since
tests beside this one may have switched Triton to its interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fathom.kernels.device import SHARED_BYTES

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def findings(repository: Any) -> dict[str, dict[str, Any]]:
    """For each kernel: how many matrix instructions, and what was found about them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sass_cases"],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_register_is_touched_while_a_matrix_instruction_uses_it(
    findings: dict[str, dict[str, Any]],
) -> None:
    assert sum(found["matrix"] > 0 for found in findings.values()) >= 6
    for name, found in findings.items():
        quiet = "keys" in name or name.endswith(", V4-Pro")
        assert found["matrix"] > 0 or quiet, name  # otherwise nothing is said about it
        assert found["touched"] == [], name


def test_every_program_fits_the_shared_memory(findings: dict[str, dict[str, Any]]) -> None:
    assert sum("V4-Pro" in name for name in findings) == 4
    for name, found in findings.items():
        assert found["shared"] <= SHARED_BYTES, name


def test_no_register_of_the_indexer_is_spilled(findings: dict[str, dict[str, Any]]) -> None:
    """Four programs of scores fit into a multiprocessor's 65,536 registers, whatever the keys."""
    own = {name: found for name, found in findings.items() if "index" in name}
    assert len(own) == 4
    for name, found in own.items():
        assert found["spills"] == 0, name
        assert 0 < found["registers"] <= 255, name
        if "scores" in name:
            assert 4 * 128 * found["registers"] <= 65536, name


LOOP = """
/*0000*/ WARPGROUP.ARRIVE ;
/*0010*/ HGMMA.64x32x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0 ;
{first}
/*0030*/ WARPGROUP.DEPBAR.LE gsb0, {left} ;
/*0040*/ IMAD.IADD R2, R3, 0x1, R2 ;
{second}
/*0060*/ @!P0 BRA 0x0000 ;
/*0070*/ STG.E [R2.64], R24 ;
/*0080*/ EXIT ;
"""


@pytest.mark.parametrize(
    ("first", "left", "second", "touched"),
    [
        ("/*0020*/ LOP3.LUT R12, R9, R3, R4, 0xea ;", "0x0", "", 0),
        ("/*0020*/ LOP3.LUT R9, R9, R3, R4, 0xea ;", "0x0", "", 1),  # its left operand
        ("/*0020*/ FADD R12, R39, R3 ;", "0x0", "", 1),  # its sum, read too early
        ("/*0020*/ FADD R12, R40, R3 ;", "0x0", "", 0),  # the register behind its sum
        ("/*0020*/ LDS.128 R4, [R2] ;", "0x0", "", 0),
        ("/*0020*/ LDS.128 R8, [R2] ;", "0x0", "", 1),
        ("", "0x0", "/*0050*/ PRMT R10, R12, 0x6622, R13 ;", 0),
        ("", "0x1", "/*0050*/ PRMT R10, R12, 0x6622, R13 ;", 1),  # one may still be under way
    ],
)
def test_what_counts_as_touching(first: str, left: str, second: str, touched: int) -> None:
    from tests.kernels.sass import examine

    found = examine(LOOP.format(first=first, left=left, second=second))
    assert found.matrix == 1
    # Where nothing waits, the last sum is stored too early as well.
    stored = 1 if left == "0x1" else 0
    assert len(found.touched) == touched + stored, found.touched


def test_an_operand_rewritten_in_the_next_round_of_a_loop_is_found() -> None:
    """As the device did to prefill's experts before they waited for each step's products."""
    from tests.kernels.sass import examine

    text = LOOP.format(first="", left="0x1", second="").replace(
        "/*0000*/ WARPGROUP.ARRIVE ;", "/*0000*/ VIADD.16x2 R10, R4, 0x20002000 ;"
    )
    assert any("VIADD" in said for said in examine(text).touched)
