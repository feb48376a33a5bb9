"""Looking inside: models, prompts as the model sees them, tokens, health, counters.

Paper: none (API conventions).
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from fathom.chat.requests.fields import Fields
from fathom.chat.tokenizer import Tokenizer
from fathom.server import documents
from fathom.server.bounds import off_loop, read_json
from fathom.server.metrics import CONTENT_TYPE
from fathom.server.problems import Problem
from fathom.server.render import Json
from fathom.server.service import Service
from fathom.server.settings import VERSION

_APIS = ("chat", "messages", "responses")
_MOST_TOKENS = 1 << 20


def add_inspection(app: FastAPI, service: Service) -> None:
    """Add all of these routes."""
    _add_models(app, service)
    _add_prompts(app, service)
    _add_tokens(app, service)
    _add_operations(app, service)


def _add_models(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def describe() -> dict[str, Any]:
        """One model in the shapes of both APIs."""
        info = service.backend.info
        return {
            "id": info.name,
            "object": "model",
            "created": started,
            "owned_by": "fathom",
            "max_model_len": info.context_tokens,
            "type": "model",
            "display_name": info.name,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        }

    @app.get("/v1/models", **documents.MODELS)
    async def models() -> dict[str, Any]:
        """The model behind this server; requests may call it by any name."""
        model = describe()
        ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
        return {"object": "list", "data": [model], **ends}

    @app.get("/v1/models/{model_id:path}", **documents.MODEL)
    async def model(model_id: str) -> dict[str, Any]:
        """The model of that name."""
        found = describe()
        if model_id != found["id"]:
            message = f"there is no model {model_id[:100]!r}; this server has {found['id']!r}"
            raise Problem(404, message, code="model_not_found", param="model")
        return found


def _add_prompts(app: FastAPI, service: Service) -> None:
    @app.post("/v1/render", **documents.RENDER)
    async def render(request: Request) -> Response:
        """The exact prompt of a request: text, token ids, mode, and what would be said in headers.

        The body is that of Chat Completions, Messages or Responses; `api` says which.
        """
        body = await read_json(request, service.settings.limits)
        api = body.pop("api", None) or ("responses" if "input" in body else "chat")
        if api not in _APIS:
            raise Problem(400, f"api must be one of {', '.join(_APIS)}", param="api")
        prepared = await service.prepare(api, body, request.state.owner)
        segments = await off_loop(body.size, prepared.request.segments)
        known = service.backend.tokenizer is not None
        shown = {
            "prompt": prepared.text,
            # Text that merely spells a special token is not one: only this list can tell.
            "segments": [{"text": part.text, "special": part.special} for part in segments],
            "token_ids": prepared.prompt if known else None,
            "tokens": len(prepared.prompt),
            "thinking": prepared.request.thinking,
            "revision": prepared.request.revision,
            "max_tokens": prepared.max_tokens,
            "context_tokens": service.backend.info.context_tokens,
            "restored_reasoning": prepared.request.restored,
            "notices": list(prepared.notices),
        }
        return await off_loop(len(prepared.prompt), Json, shown)


def _add_tokens(app: FastAPI, service: Service) -> None:
    def tokenizer() -> Tokenizer:
        found = service.backend.tokenizer
        if found is None:
            raise Problem(400, "this gateway has no tokenizer: start it with --tokenizer",
                          code="no_tokenizer")  # fmt: skip
        return found

    @app.post("/tokenize", **documents.TOKENIZE)
    async def tokenize(request: Request) -> Response:
        """Token ids of a text; `special` recognises special tokens that it spells."""
        body = await read_json(request, service.settings.limits)
        fields = Fields(body)
        text = fields.required_text("prompt")
        special = fields.boolean("special") or False
        found = tokenizer()

        def work() -> Response:
            ids = found.encode(text, special)
            if len(ids) > _MOST_TOKENS:
                fields.fail("prompt", f"must be at most {_MOST_TOKENS} tokens")
            pieces = [found.decode([token]) for token in ids]
            context = service.backend.info.context_tokens
            return Json({"count": len(ids), "tokens": ids, "token_strs": pieces,
                         "max_model_len": context})  # fmt: skip

        return await off_loop(body.size, work)

    @app.post("/detokenize", **documents.DETOKENIZE)
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = await read_json(request, service.settings.limits)
        fields = Fields(body)
        ids = fields.items("tokens") or []
        found = tokenizer()

        def work() -> Response:
            if len(ids) > _MOST_TOKENS or not all(_is_token(i, found.vocab_size) for i in ids):
                fields.fail("tokens", f"must be at most {_MOST_TOKENS} token ids, each from 0 to "
                            f"{found.vocab_size - 1}")  # fmt: skip
            return Json({"prompt": found.decode(ids)})

        return await off_loop(body.size, work)


def _is_token(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)  # which some watchers ask for
    @app.get("/health", **documents.HEALTH)
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok", "version": VERSION}

    @app.get("/metrics", **documents.METRICS)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        counters = service.metrics.render()
        engine = getattr(service.backend, "metrics_text", None)  # engines may have their own
        if engine is not None:
            counters += (await engine()).encode()
        return PlainTextResponse(counters, media_type=CONTENT_TYPE)
