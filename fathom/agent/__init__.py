"""The agent: a model with a bash tool and an edit tool works on a task in a sandbox.

    agent = Agent(model=HTTPModel("http://127.0.0.1:8000"))
    async with Client("local") as client:
        sandbox = await client.create(Container())
        episode = await agent.run("How many lines has /etc/passwd?", sandbox)

Paper: §5.3.1 (code agents).
"""

from __future__ import annotations

from fathom.agent.context import Context, Limits
from fathom.agent.loop import Agent, Episode, Status, Step
from fathom.agent.model import HTTPModel, Model, api_key_from_environment
from fathom.agent.recorded import RecordedModel
from fathom.agent.tool import BASH, EDIT, SYSTEM_PROMPT, Parameter, Tool, ToolSet
from fathom.agent.types import Sandbox, ToolResult

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
