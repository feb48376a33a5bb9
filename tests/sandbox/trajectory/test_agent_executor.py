"""The receipts of the agent inside a sandbox, used by a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from fathom.errors import Unsupported
from fathom.sandbox import Client, Container
from fathom.sandbox.trajectory.executor import (
    AgentExecutor,
    Finished,
    NeverSeen,
    Running,
)
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.operation import Operation, Request, exec_request
from fathom.sandbox.trajectory.session import Session
from tests.sandbox.trajectory.machines import Crash, MortalLog


@pytest.mark.parametrize("crash", ["before RECEIPT s1", "after INTENT s1"])
def test_a_session_gets_its_receipts_from_the_agent(
    tmp_path: Path, runtime_dir: Path, cache_dir: Path, crash: str
) -> None:
    operation = Operation(key="s1", request=exec_request("echo $$ | tee -a f", timeout=20))

    async def main() -> None:
        async with Client("local", runtime_dir=runtime_dir, cache_dir=cache_dir) as client:
            try:
                sandbox: Any = await client.create(Container())
            except Unsupported as error:
                pytest.skip(f"no sandbox on this machine: {error}")
            if not hasattr(sandbox, "receipt"):
                pytest.skip("the sandboxes of this version keep no receipts")
            log = MortalLog(tmp_path, durability="process", segment_size=1 << 18)
            executor = await AgentExecutor.open(sandbox)
            session = await Session.begin(log, "sb", executor)
            log.crash = crash
            with pytest.raises(Crash):
                await session.run(operation)
            log.die()
            # Another client, which knows nothing but the log and the sandbox.
            executor = await AgentExecutor.open(sandbox)
            began = crash == "before RECEIPT s1"
            answer = await executor.query("s1", operation.request)
            assert isinstance(answer, Finished if began else NeverSeen)
            with Log(tmp_path, durability="process") as again:
                session = await Session.attach(again, "sb", executor)
                outcome = await session.run(operation)
                assert outcome.cached is began
                read = Request(verb="read", arguments={"path": "/work/f"})
                written = await session.run(Operation(key="s2", request=read, effect="pure"))
            assert written.data() == outcome.blobs["stdout"]
            assert written.data().count(b"\n") == 1
            slow = exec_request("sleep 0.5; echo slow", timeout=20)
            async with anyio.create_task_group() as group:
                group.start_soon(executor.dispatch, "slow", b"", slow, lambda: None)
                await anyio.sleep(0.2)
                assert isinstance(await executor.query("slow", slow), Running)
            found = await executor.query("slow", slow)
            assert isinstance(found, Finished)
            assert found.outcome.blobs["stdout"] == b"slow\n"

    anyio.run(main)
