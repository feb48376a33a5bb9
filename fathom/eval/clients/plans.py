"""What each client is, how it is installed and called, and the session it is driven through.

Paper: none (a test).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fathom.errors import MissingDependency

PORT = 8399
BASE = f"http://127.0.0.1:{PORT}"
MODEL, SMALL_MODEL = "deepseek-v4-pro", "deepseek-v4-flash"
PACKAGES = {
    "claude-code": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "opencode": "opencode-ai",
    "qwen-code": "@qwen-code/qwen-code",
}
MINI = "mini-swe-agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One run of a client, or one line typed into it.

    again: it goes on with the conversation of the step before. requests: how many requests of the
    main loop it takes. expect: what the client must show. cancel: interrupt it while the model
    speaks.
    """

    name: str
    prompt: str
    requests: int
    expect: str = ""
    again: bool = False
    cancel: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A client: its program below the folder of clients, arguments, variables and files.

    `first` and `again` are its arguments, PROMPT standing for the prompt. typed: it is one program
    for a whole conversation, and prompts after the first are typed on its terminal.
    """

    name: str
    program: str
    first: tuple[str, ...]
    again: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict[str, str])
    files: dict[str, str] = field(default_factory=dict[str, str])
    typed: bool = False


ANSWER, DONE = "The answer is 4.", "Done. The folder holds"
STEPS = (
    Step(name="plain", prompt="[[plain]] What is 2 + 2?", requests=1, expect=ANSWER),
    Step(
        name="tools",
        prompt="[[two]] List the folder, then tell me the colour in notes.txt.",
        requests=3,
        expect=DONE,
        again=True,
    ),
    Step(
        name="follow-up",
        prompt="[[plain]] And what was 2 + 2?",
        requests=1,
        expect=ANSWER,
        again=True,
    ),
    Step(name="cancel", prompt="[[slow]] Tell me a long story.", requests=1, cancel=True),
    Step(
        name="after",
        prompt="[[plain]] Never mind. What is 2 + 2?",
        requests=1,
        expect=ANSWER,
        again=True,
    ),
)

_CODEX = f"""\
model = "{MODEL}"
model_provider = "local"
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.local]
name = "local"
base_url = "{BASE}/v1"
env_key = "LOCAL_KEY"
wire_api = "responses"
"""
_OPENCODE = {
    "autoupdate": False,
    "permission": "allow",
    "small_model": f"deepseek/{SMALL_MODEL}",
    "provider": {"deepseek": {"options": {"baseURL": f"{BASE}/v1", "apiKey": "x"}}},
}
_CODEX_RUN = ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
              "-c", "model_reasoning_effort=high")  # fmt: skip
_CLAUDE = ("-p", "PROMPT", "--allowedTools", "Bash", "Read", "--output-format", "json")
_OPENCODE_RUN = ("-m", f"deepseek/{MODEL}", "--variant", "max", "PROMPT")
_QWEN = ("--auth-type", "openai", "--yolo")

CLIENTS = (
    Client(
        name="claude-code",
        program="node_modules/.bin/claude",
        first=_CLAUDE,
        again=("-c", *_CLAUDE),
        variables={
            "ANTHROPIC_BASE_URL": BASE,
            "ANTHROPIC_AUTH_TOKEN": "x",
            "ANTHROPIC_MODEL": MODEL,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": SMALL_MODEL,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_AUTOUPDATER": "1",
        },
    ),
    Client(
        name="codex",
        program="node_modules/.bin/codex",
        first=(*_CODEX_RUN, "PROMPT"),
        again=(*_CODEX_RUN, "resume", "--last", "PROMPT"),
        variables={"LOCAL_KEY": "x"},
        files={".codex/config.toml": _CODEX},
    ),
    Client(
        name="opencode",
        program="node_modules/.bin/opencode",
        first=("run", *_OPENCODE_RUN),
        again=("run", "-c", *_OPENCODE_RUN),
        variables={"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"},
        files={".config/opencode/opencode.json": json.dumps(_OPENCODE)},
    ),
    Client(
        name="qwen-code",
        program="node_modules/.bin/qwen",
        first=(*_QWEN, "PROMPT"),
        again=(*_QWEN, "-c", "PROMPT"),
        variables={"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": f"{BASE}/v1", "OPENAI_MODEL": MODEL},
    ),
    Client(
        name=MINI,
        program="mini/bin/mini",
        first=("-m", f"openai/{MODEL}", "-y", "-l", "0", "-t", "PROMPT"),
        variables={
            "OPENAI_API_KEY": "x",
            "OPENAI_API_BASE": f"{BASE}/v1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "MSWEA_COST_TRACKING": "ignore_errors",
            "MSWEA_CONFIGURED": "true",
        },
        typed=True,
    ),
)


def check_installed(clients: list[Client], folder: Path) -> None:
    """Raises MissingDependency with the lines that install what `folder` lacks."""
    missing = [c for c in clients if not (folder / c.program).exists()]
    if not missing:
        return
    packages = " ".join(PACKAGES[c.name] for c in missing if c.name in PACKAGES)
    lines = [f"mkdir -p {folder}"]
    if packages:
        lines.append(f"npm install --prefix {folder} {packages}")
    if any(c.name == MINI for c in missing):
        lines += [f"python3 -m venv {folder}/mini", f"{folder}/mini/bin/pip install {MINI}"]
    names = ", ".join(c.name for c in missing)
    raise MissingDependency(
        f"{folder} lacks {names}; install with\n" + "\n".join(f"  {line}" for line in lines)
    )
