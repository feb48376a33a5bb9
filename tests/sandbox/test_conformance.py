"""Every substrate goes through the conformance suite, and the suite through sandboxes that lie."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.from_thread
import pytest

from fathom.errors import SandboxLost
from fathom.sandbox import (
    Client,
    Container,
    Fn,
    FnResult,
    Functions,
    Sandbox,
    conformance,
    conformance_fn,
)
from fathom.sandbox.substrates.choice import suited

each_substrate = pytest.mark.parametrize("substrate", suited(), indirect=True)


@each_substrate
@pytest.mark.timeout(300)
def test_conformance(substrate: str, options: dict[str, Path]):
    async def run() -> conformance.Report:
        async with Client(substrate=substrate, **options) as client:
            return await conformance.run(lambda: client.create(Container()))

    report = anyio.run(run)
    assert report.passed, str(report)
    assert {outcome.name for outcome in report.outcomes} == set(conformance.CHECKS)
    assert len(conformance.CHECKS) >= 21


@each_substrate
@pytest.mark.timeout(300)
def test_conformance_of_functions(substrate: str, options: dict[str, Path]):
    async def run() -> conformance.Report:
        async with Client(substrate=substrate, **options) as client:
            return await conformance_fn.run(lambda: client.functions(Fn(workers=1, maximum=1)))

    report = anyio.run(run)
    assert report.passed, str(report)
    assert {outcome.name for outcome in report.outcomes} == set(conformance_fn.CHECKS)


@pytest.mark.parametrize(
    ("check", "method"), [("call", "call"), ("exec", "exec"), ("surface", "fork"), ("end", "exec")]
)
def test_a_pool_that_lies_is_found(check: str, method: str, options: dict[str, Path]):
    async def run() -> conformance.Report:
        async with Client(**options) as client:

            async def make() -> Functions:
                functions = await client.functions(Fn(workers=1, maximum=1))

                async def lie(*_: object, **__: object) -> object:
                    return FnResult(value=5, output="hi\n")

                setattr(functions, method, lie)
                return functions

            return await conformance_fn.run(make, only=check)

    with anyio.from_thread.start_blocking_portal() as portal:
        try:
            passed = portal.call(run).passed
        except AttributeError:
            passed = False
    assert not passed


def test_the_surface_is_that_of_the_documentation():
    for kind in (Sandbox, Functions):
        for name in set(conformance.METHODS) - {"caps", "files"}:
            assert callable(getattr(kind, name)), (kind, name)


LIES = {
    "exec": "exec",
    "input": "exec",
    "timeout": "exec",
    "streams": "run",
    "files": "files",
    "operation_keys": "receipt",
    "pause": "pause",
    "end": "stop",
}


@pytest.mark.parametrize(("check", "method"), LIES.items(), ids=list(LIES))
def test_a_sandbox_that_lies_is_found(check: str, method: str, options: dict[str, Path]):
    """A sandbox in which one method does something else fails the check of that method."""

    async def run() -> conformance.Report:
        async with Client(**options) as client:

            async def make() -> Sandbox:
                sandbox = await client.create(Container())
                other = sandbox.exec

                async def lie(*_: object, **values: object) -> object:
                    if method == "stop":
                        return None
                    if method == "pause":
                        return None
                    return await other("echo lie", timeout=5)

                if method == "files":
                    sandbox.files.write = lie  # type: ignore[method-assign]
                else:
                    setattr(sandbox, method, lie)
                return sandbox

            return await conformance.run(make, only=check)

    with anyio.from_thread.start_blocking_portal() as portal:
        try:
            passed = portal.call(run).passed
        except (AttributeError, TypeError, SandboxLost):
            passed = False
    assert not passed
