"""`fathom serve`: the HTTP server, in front of a model here or of another server.

Paper: none (command line).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fathom.cli import engine_options as engine
from fathom.errors import ServerError

if TYPE_CHECKING:
    from fathom.engine.options import EngineConfig
    from fathom.server.backend import Backend

KEY_VARIABLE = "FATHOM_API_KEY"
SCRIPTED = "scripted"


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder or shipped model (default: nano); `scripted` answers without "
            "a model, for trying clients."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A key that clients must send; may be repeated. Others on this machine can see "
            f"it here: ${KEY_VARIABLE} is safer."
        ),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="Generate with the plain completions of the server at this URL."),
    ] = None,
    upstream_model: Annotated[
        str | None, typer.Option(help="The model's name there (default: its first one).")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context, where the upstream tells none.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="tokenizer.json of the upstream's model; prompts then go out as token ids. "
            "Without it they go out as text."
        ),
    ] = None,
    device: engine.Device = None,
    disk_cache: engine.DiskCache = None,
    disk_cache_size: engine.DiskCacheSize = None,
    host_cache_size: engine.HostCacheSize = None,
    cache_tokens: engine.CacheTokens = None,
    checkpoint_spacing: engine.CheckpointSpacing = None,
    token_log: engine.TokenLog = None,
    drafts: engine.Drafts = None,
    index_keys: engine.IndexKeys = None,
    batch_invariant: engine.BatchInvariant = None,
    max_sequences: engine.MaxSequences = None,
    revision: Annotated[str, typer.Option(help="Prompts of 0424 or 0731 models.")] = "0424",
    stream_arguments: Annotated[
        bool, typer.Option(help="Pass on arguments of calls while they are written.")
    ] = False,
    repaired_calls: Annotated[
        bool, typer.Option(help="Deliver calls that were rebuilt by guesswork.")
    ] = False,
    require_reasoning: Annotated[
        bool, typer.Option(help="Refuse turns whose reasoning is lost, as the hosted API does.")
    ] = False,
    origin: Annotated[
        list[str] | None, typer.Option(help="Let web pages of this origin call; may be repeated.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Write every request, its prompt and the reply to this file, as JSON lines. It "
            "holds whole conversations."
        ),
    ] = None,
    max_request_bytes: Annotated[int, typer.Option(min=1)] = 8 << 20,
    max_messages: Annotated[int, typer.Option(min=1)] = 10_000,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest reply.")] = 393_216,
    max_connections: Annotated[int, typer.Option(min=1)] = 512,
    max_running: Annotated[int, typer.Option(min=1, help="Completions at a time.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Completions that may wait.")] = 256,
) -> None:
    """Serve Chat Completions, Responses, Messages and Completions over HTTP.

    Listens on this machine only unless an API key is set. Stops with Ctrl-C.
    """
    options = {
        "disk_cache": disk_cache,
        "disk_cache_size": disk_cache_size,
        "host_cache_size": host_cache_size,
        "cache_tokens": cache_tokens,
        "checkpoint_spacing": checkpoint_spacing,
        "token_log": token_log,
        "drafts": drafts,
        "index_keys": index_keys,
        "batch_invariant": batch_invariant,
        "max_sequences": max_sequences,
    }
    from fathom.chat.protocol import find_revision
    from fathom.server.run import serve as run
    from fathom.server.settings import Limits, Settings, check_settings

    variable = os.environ.get(KEY_VARIABLE)
    keys = (*(api_key or ()), *([variable] if variable else []))
    settings = Settings(
        host=host,
        port=port,
        api_keys=keys,
        revision=find_revision(revision).name,
        stream_arguments=stream_arguments,
        repaired_calls=repaired_calls,
        require_reasoning=require_reasoning,
        origins=tuple(origin or ()),
        limits=Limits(
            request_bytes=max_request_bytes,
            messages=max_messages,
            prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            connections=max_connections,
            running=max_running,
            waiting=max_waiting,
        ),
    )
    check_settings(settings)  # before a large model is loaded
    logging.getLogger("fathom.engine").setLevel(logging.WARNING)  # damaged files, logs left behind
    if upstream is not None:
        for option, value in {"model": model, "device": device, **options}.items():
            if value is not None:
                raise ServerError(
                    f"--{option.replace('_', '-')} and --upstream exclude each other: the upstream "
                    "runs the model; --upstream-model names it"
                )
        backend = _gateway(upstream, upstream_model, context, tokenizer)
    else:
        backend = _local(model or "nano", device or "cpu", engine.engine_config(options))

    def listening(address: str) -> None:
        sys.stderr.write(f"{backend.info.name} answers at {address} (Ctrl-C ends)\n")
        sys.stderr.flush()

    run(backend, settings, on_start=listening, record=record)


def _local(model: str, device: str, config: EngineConfig | None) -> Backend:
    if model == SCRIPTED:
        if config is not None:
            raise ServerError(f"--model {SCRIPTED} has no engine: leave its options out")
        from fathom.server.scripted import ScriptedBackend
        from fathom.server.sessions import Session

        return ScriptedBackend(Session(), shipped_tokenizer())
    import fathom
    from fathom.cli.models import announce_compiling
    from fathom.engine.backend import LocalBackend

    llm = fathom.load(model, device=device, engine=config)
    if device == "cpu":
        announce_compiling()
    backend = LocalBackend(llm)
    backend.prepare()  # what cannot be had is told before anybody connects
    return backend


def _gateway(url: str, model: str | None, context: int | None, tokenizer: str | None) -> Backend:
    from fathom.chat import Tokenizer
    from fathom.server.gateway import open_gateway

    return open_gateway(
        url,
        model=model,
        context_tokens=context,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
        api_key=os.environ.get("FATHOM_UPSTREAM_KEY"),
    )


def shipped_tokenizer():
    """The tokenizer of the model that comes with the package, without loading that model."""
    from importlib.resources import as_file, files

    from fathom.chat import Tokenizer

    with as_file(files("fathom") / "assets" / "nano") as folder:
        return Tokenizer.load(folder)
