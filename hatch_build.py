"""The package's build compiles the program that runs inside every sandbox.

Where no C compiler is at hand the package is built without it; the first sandbox then says what to
install. A wheel that carries it is for one kind of machine.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AgentBuild(BuildHookInterface):
    """Compile the agent, and mark the wheel as one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run before the files are collected; `version` is "standard" or "editable"."""
        root = Path(self.root)
        sys.path.insert(0, str(root))
        try:
            found = importlib.util.spec_from_file_location(
                "fathom_agent_build", root / "fathom/sandbox/agent/__init__.py"
            )
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            program = module.build_beside_sources()
        except Exception as error:
            self.app.display_warning(f"built without the sandbox's agent: {error}")
            return
        finally:
            sys.path.remove(str(root))
        if version == "standard":
            build_data["artifacts"] += [
                str(path.relative_to(root)) for path in (program, program.with_suffix(".digest"))
            ]
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
