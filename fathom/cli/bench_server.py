"""`fathom bench server`: what the server costs per token, with a mock model behind it.

Paper: none (measurement).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fathom.cli.output import print_json, print_table

APIS = ("chat", "messages", "responses")


def server(
    streams: Annotated[int, typer.Option(min=1, help="Streams at the same time.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each stream.")] = 512,
    step_ms: Annotated[
        float, typer.Option(min=0, help="One token per stream in this time; 0: no waiting.")
    ] = 20.0,
    api: Annotated[str, typer.Option(help=f"One of {', '.join(APIS)}.")] = "chat",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure processor time per token, throughput and the delay of the first byte.

    The server runs in a process of its own; its time includes the mock model's.
    """
    from fathom.server.load import Load, measure

    if api not in APIS:
        raise typer.BadParameter(f"--api is {api!r}; there are {', '.join(APIS)}")
    load = Load(streams=streams, tokens=tokens, step=step_ms / 1e3, api=api)
    report = {**measure(load), "mask": mask_cost()}
    bare = measure(load, bare=True)["server_cpu_us_per_token"] if api == "chat" else None
    report["bare_us_per_token"] = bare
    if as_json:
        print_json(report)
        return
    first, mask = report["first_byte_ms"], report["mask"]
    print(f"{streams} streams of {tokens} tokens, one per {step_ms:g} ms; {report['cores']} cores, "
          f"load average {report['load_average'][0]:.1f}")  # fmt: skip
    print_table(
        ["", "us/token", "of which kernel", "tokens/s", "first byte ms", "p99"],
        [[api, f"{report['server_cpu_us_per_token']:.1f}", f"{report['of_which_kernel_us']:.1f}",
          f"{report['tokens_per_s']:,.0f}", f"{first['median']:.2f}", f"{first['p99']:.2f}"]],
    )  # fmt: skip
    if bare is not None:
        print(
            f"a bare application that writes the same bytes takes {bare:.1f} us per token, so the "
            f"server adds {report['server_cpu_us_per_token'] - bare:.1f}"
        )
    print(
        f"constrained decoding: {mask['us_per_token']:.0f} us per token of a strict call, "
        f"{mask['compile_ms']:.1f} ms to compile its grammar (vocabulary of {mask['vocabulary']})"
    )


def mask_cost() -> dict[str, Any]:
    """What masks cost per token, for a strict call and the shipped model's vocabulary."""
    import time

    from fathom.chat.requests import read_chat
    from fathom.cli.serve import shipped_tokenizer
    from fathom.server.constrain import Constrainer

    tokenizer = shipped_tokenizer()
    properties = {"path": {"type": "string"}, "line": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["path", "line"]}
    function = {"name": "open", "strict": True, "parameters": parameters}
    request = read_chat(
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
            "thinking": {"type": "disabled"},
        }
    )
    dsml = "\uff5cDSML\uff5c"
    text = (
        f'<{dsml}invoke name="open">\n<{dsml}parameter name="path" string="true">'
        + "/some/where " * 40
        + f'</{dsml}parameter>\n<{dsml}parameter name="line" string="false">12'
        f"</{dsml}parameter>\n</{dsml}invoke>"
    )
    ids = tokenizer.encode(text, special=True)
    constrainer = Constrainer(tokenizer)
    constrainer.mask(read_chat({"messages": [{"role": "user", "content": "json"}],
                                "response_format": {"type": "json_object"}}))  # fmt: skip
    started = time.perf_counter()
    mask = constrainer.mask(request)
    compiled = time.perf_counter() - started
    assert mask is not None
    started = time.perf_counter()
    for token in ids:
        mask.allowed()
        mask.accept(token)
    spent = time.perf_counter() - started
    return {
        "us_per_token": 1e6 * spent / len(ids),
        "compile_ms": 1e3 * compiled,
        "vocabulary": tokenizer.vocab_size,
        "tokens": len(ids),
    }
