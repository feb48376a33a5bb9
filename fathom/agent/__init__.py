"""The agent: a model with a bash tool and an edit tool works on a task in a sandbox.

    agent = Agent(model=HTTPModel("http://127.0.0.1:8000"))
    async with Client("local") as client:
        sandbox = await client.create(Container())
        episode = await agent.run("How many lines has /etc/passwd?", sandbox)

Paper: §5.3.1 (code agents).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathom.agent.context import Context, Limits
from fathom.agent.loop import Agent, Episode, Status, Step
from fathom.agent.model import Model, api_key_from_environment
from fathom.agent.recorded import RecordedModel
from fathom.agent.tool import BASH, EDIT, SYSTEM_PROMPT, Parameter, Tool, ToolSet
from fathom.agent.types import Sandbox, ToolResult

if TYPE_CHECKING:
    from fathom.agent.http_model import HTTPModel

__all__ = [
    "BASH",
    "EDIT",
    "SYSTEM_PROMPT",
    "Agent",
    "Context",
    "Episode",
    "HTTPModel",
    "Limits",
    "Model",
    "Parameter",
    "RecordedModel",
    "Sandbox",
    "Status",
    "Step",
    "Tool",
    "ToolResult",
    "ToolSet",
    "api_key_from_environment",
]


def __getattr__(name: str) -> object:
    """Load HTTPModel on first use: its HTTP library is slow to import. Raises AttributeError."""
    if name != "HTTPModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fathom.agent.http_model import HTTPModel

    return HTTPModel
