"""The surface without `await` is the same surface."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading

import pytest

from fathom.sandbox import (
    Client,
    Container,
    Fn,
    Functions,
    Group,
    Process,
    Sandbox,
    SyncClient,
    SyncFunctions,
    SyncGroup,
    SyncProcess,
    SyncSandbox,
    SyncWorker,
    Worker,
)
from fathom.sandbox.files import Files
from fathom.sandbox.sync import SyncFiles

# What a context manager calls and what runs at exit without any loop belongs to one side only.
ONE_SIDED = {"hand_line", "resumed", "paused", "members", "pause_all", "resume_all"}
# Plain on both sides: they wait for nothing.
PLAIN = {"output", "group", "members", "forward", "follow"}


def surface(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(value)
        for name, value in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


@pytest.mark.parametrize(
    ("asynchronous", "synchronous"),
    [
        (Client, SyncClient),
        (Sandbox, SyncSandbox),
        (Files, SyncFiles),
        (Process, SyncProcess),
        (Group, SyncGroup),
        (Functions, SyncFunctions),
        (Worker, SyncWorker),
    ],
)
def test_same_methods_with_the_same_arguments(asynchronous: type, synchronous: type):
    theirs, ours = surface(asynchronous), surface(synchronous)
    assert theirs.keys() - ours.keys() <= ONE_SIDED
    assert ours.keys() <= theirs.keys()
    for name in ours.keys() - {"__init__"}:
        assert inspect.iscoroutinefunction(getattr(asynchronous, name)) == (name not in PLAIN), name
        assert not inspect.iscoroutinefunction(getattr(synchronous, name)), name
        assert list(ours[name].parameters.values()) == list(theirs[name].parameters.values()), name
        wanted = str(theirs[name].return_annotation)
        renamed = re.sub(r"\b(Sandbox|Process|Group|Functions|Forward)\b", r"Sync\1", wanted)
        iterated = wanted.replace("AsyncIterator", "Iterator")
        assert str(ours[name].return_annotation) in (wanted, renamed, iterated)
    if asynchronous is Client:
        assert ours["__init__"].parameters == theirs["__init__"].parameters


def test_the_comparison_sees_differences():
    class Other(SyncClient):
        def create(self, spec: int = 5) -> SyncSandbox: ...  # type: ignore[override]

        def more(self) -> None: ...

    assert surface(Other)["create"] != surface(Client)["create"]
    assert "more" not in surface(Client)


def attributes(thing: object) -> set[str]:
    """What can be read of an object besides its methods."""
    kind = type(thing)
    found = {name for name in vars(thing) if not name.startswith("_")}
    found |= {name for name in dir(kind) if isinstance(getattr(kind, name), property)}
    return {name for name in found if not name.startswith("_")}


def test_same_attributes(client: SyncClient):
    sandbox = client.create(Container(), group="g")
    with (
        sandbox.run("true", timeout=10) as process,
        client.functions(Fn(workers=1)) as functions,
    ):
        group = client.group("g")
        pairs = [
            (sandbox, sandbox._sandbox),
            (sandbox.files, sandbox.files._files),
            (process, process._process),
            (functions, functions._functions),
            (group, group._group),
            (client, client._client),
        ]
        for synchronous, asynchronous in pairs:
            assert attributes(asynchronous) <= attributes(synchronous)
        for name in attributes(sandbox._sandbox) - {"files"}:
            assert getattr(sandbox, name) == getattr(sandbox._sandbox, name), name
    assert "stopped" in attributes(sandbox)
    assert not sandbox.stopped
    sandbox.stop()
    assert sandbox.stopped


def test_one_thread_per_client_from_any_thread(client: SyncClient):
    sandbox = client.create(Container())
    results: dict[int, str] = {}

    def run(number: int) -> None:
        results[number] = sandbox.exec(f"echo {number}", timeout=10).stdout

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    loops = [thread for thread in threading.enumerate() if thread.name == "fathom-sandbox-loop"]
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n" for number in range(8)}
    assert len(loops) == 1


def test_importing_the_package_starts_and_loads_little():
    code = (
        "import sys, threading; import fathom.sandbox; "
        "print('anyio' in sys.modules, threading.active_count()); "
        "from fathom.sandbox import *; "
        "print('anyio' in sys.modules, 'torch' in sys.modules, threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False 1\nTrue False 1\n", done.stderr


def test_unknown_names():
    import fathom.sandbox

    with pytest.raises(AttributeError, match="has no attribute 'Docker'"):
        fathom.sandbox.Docker  # noqa: B018
