"""DeepSeek's own converter and stream parser, as an independent judge.

Needs the package `deepseek-recipe`, which is a test dependency only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import deepseek_recipe as recipe

MODEL = "DeepSeek-V4-Pro"
_REQUESTS = {
    "chat": recipe.ChatCompletionRequest,
    "messages": recipe.MessagesRequest,
    "responses": recipe.ResponsesRequest,
}


def convert(api: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What the converter makes of a request: status 400, or prompt, special ranges and mode."""
    try:
        request = _REQUESTS[api](json.dumps({"model": MODEL, **body}))
        converted = request.convert(recipe.ConversionOptions())
    except (recipe.ConversionError, ValueError):
        return {"status": 400}
    rendered = recipe.DeepseekV4Encoding().render_conversation(converted.conversation)
    return {
        "status": 200,
        "prompt": rendered.prompt,
        "special": [list(found) for found in rendered.special_ranges],
        "thinking": converted.conversation.thinking_mode,
    }


def parse(pieces: Iterable[str], thinking: bool, **options: Any) -> dict[str, Any]:
    """What the stream parser makes of a completion: reasoning, content, tool_calls."""
    request = recipe.ChatCompletionRequest(
        json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Q"}]})
    ).convert(recipe.ConversionOptions())
    stage = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    processor = recipe.StreamProcessor(
        recipe.ChatCompletionRequest.chunk_generator(request, "ID", MODEL),
        recipe.ParsingOptions(**{"thinking_initial_stage": stage} | options),
    )
    response = recipe.ChatCompletionResponse("ID", MODEL, 0, 0, 0)
    chunks = [*processor.push(recipe.InferenceChunk.ready())]
    for piece in pieces:
        chunks += processor.push(recipe.InferenceChunk.text(piece, 1))
        if processor.finished:
            break
    if not processor.finished:
        chunks += processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    if not processor.finished:
        chunks += processor.finish()
    for chunk in chunks:
        response.accumulate(chunk)
    choice = json.loads(response.to_json())["choices"][0]
    message = choice["message"]
    return {
        "reasoning": message.get("reasoning_content") or "",
        "content": message.get("content") or "",
        "tool_calls": [
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for call in message.get("tool_calls") or []
        ],
        "finish_reason": choice["finish_reason"],
    }
