"""The agent's loop as it runs in a worker: what to do, the sandbox and the model are at its door.

Nothing that it says or does is lost with it: operations and turns are in the log before they count,
so a second worker goes through the same steps and then on.

Paper: §5.2.5 (V4.1: the loop in a worker beside its sandbox), §5.3.1 (code agents).
"""

from __future__ import annotations

from typing import Any

import anyio

from fathom.agent.context import Limits
from fathom.agent.http_model import HTTPModel
from fathom.agent.loop import Agent
from fathom.agent.recorded import RecordedModel
from fathom.agent.report import keep_report, report
from fathom.chat.reply import Sampling
from fathom.errors import FathomError
from fathom.sandbox.trajectory.recorded import RecordedSandbox
from fathom.sandbox.types import DOOR
from fathom.sandbox.worker.inside import DoorSession

# With the pauses in between about an hour: nobody who could decide otherwise is looking on.
_RETRIES = 60


async def work(order: dict[str, Any], session: DoorSession) -> None:
    """Work on a task to its end and say so at the door. Raises FathomError."""
    model = HTTPModel(
        order["url"],
        model=order["model"],
        api_key=order.get("api_key"),
        retries=_RETRIES,
        socket=f"{DOOR}/model",
    )
    agent = Agent(
        model=RecordedModel(model, session),
        thinking=order["thinking"],
        sampling=Sampling(**order["sampling"]),
        limits=Limits(**order["limits"]),
    )
    # The model can look for itself whether a command took effect that nobody knows about.
    episode = await agent.run(order["task"], RecordedSandbox(session, tell=True))
    await keep_report(report(episode, model.name, order["thinking"]), session)
    await session.end({"status": episode.status, "answer": episode.answer})


async def _main() -> None:
    session = DoorSession()
    order = await session.order()
    try:
        await work(order, session)
    except FathomError as error:
        await session.fail(error.code, str(error))


def main() -> None:
    """Run the loop of a worker."""
    anyio.run(_main)
