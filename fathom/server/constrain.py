"""Constrained decoding: what a request demands, as a mask over the next token.

The thought stays free: a model that thinks finishes thinking, and only then the grammar begins.
Until then the mask forbids just what would slip past it: a call, and the end of the reply.

Paper: §5.1.1 (tool-call schema; reasoning comes before calls).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from fathom.chat.requests import PromptRequest
from fathom.chat.tokenizer import Tokenizer
from fathom.errors import GenerationError
from fathom.server.backend import TokenMask
from fathom.server.grammar import GrammarBuilder
from fathom.server.problems import Problem
from fathom.server.schemas import run_on_deep_stack

_KEPT = 64  # compiled grammars


class Constrainer:
    """Makes masks for one tokenizer. Compiling takes a while: call it outside the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._marker = tokenizer.token_id("dsml")
        self._think_end = tokenizer.token_id("think_end")
        self._everything = _bits(tokenizer.vocab_size)
        self._no_call = self._without(self._marker)
        self._lock = threading.Lock()
        self._library_lock = threading.Lock()
        self._library: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def needs_grammar(self, request: PromptRequest) -> bool:
        """Whether `mask` has something to compile, which takes a while."""
        if request.response_format.kind != "text":
            return True
        may_call = bool(request.tools) and request.tool_choice.mode != "none"
        return may_call and (request.tool_choice.mode == "required" or _narrow(request))

    def mask(self, request: PromptRequest) -> TokenMask | None:
        """The mask that a request needs, None if it is free. Raises Problem for a bad schema."""
        forbidden = not request.tools or request.tool_choice.mode == "none"
        grammar, param = self._grammar(request, forbidden)
        if grammar is None:
            if not forbidden:
                return None
            # No call can come, so no text need be thrown away later.
            return _Constant(self._no_call)
        matcher = _Grammar(self._compile(grammar, param), param, grammar)
        if not request.reasons:
            return matcher
        must_answer = (
            request.tool_choice.mode == "required" or request.response_format.kind != "text"
        )
        banned = (self._marker, *([self._tokenizer.eos_id] if must_answer else []))
        return _AfterThought(matcher, self._think_end, self._without(*banned))

    def _grammar(self, request: PromptRequest, forbidden: bool) -> tuple[str | None, str]:
        builder = GrammarBuilder(self._marker)
        choice, form = request.tool_choice, request.response_format
        tools = [t for t in request.tools if not choice.names or t.name in choice.names]
        many = choice.parallel
        if choice.mode == "required" and not forbidden:
            opened = request.opens_calls
            calls = builder.calls(tools, many=many, opened=opened)
            return builder.text(calls if opened else f'"\\n\\n" {calls}'), "tools"
        if form.kind != "text":
            schema = {"type": "object"} if form.kind == "json_object" else form.schema
            start = builder.json(schema)
            if not forbidden:
                calls = builder.calls(tools, many=many, opened=False)
                start = f'{start} | "\\n\\n" {calls}'
            return builder.text(start), "response_format"
        if not forbidden and _narrow(request):
            return builder.text(builder.text_then(tools, many=many)), "tools"
        return None, ""

    def _compile(self, grammar: str, param: str) -> LLMatcher:
        found = self._known(grammar)
        if found is None:
            # Its compiler is recursive, and a crash there would end the whole server.
            found = run_on_deep_stack(partial(self._build, grammar))
            if found.is_error():
                reason = found.get_error().split("\n")[0][:300]
                raise Problem(400, f"the schema cannot be enforced: {reason}",
                              code="unsupported_schema", param=param)  # fmt: skip
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return found.deep_copy()

    def _known(self, grammar: str) -> LLMatcher | None:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
            return found

    def _build(self, grammar: str) -> LLMatcher:
        """Compile without the lock: nobody else waits for one client's schema."""
        with self._library_lock:
            if self._library is None:
                self._library = _library_tokenizer(self._tokenizer)
        built = LLMatcher(self._library, grammar, log_level=0)
        if not built.is_error():
            built.compute_bitmask()  # makes much of what later masks need, and shows what is wrong
        return built

    def _without(self, *tokens: int) -> bytes:
        bits = bytearray(self._everything)
        for token in tokens:
            bits[token // 8] &= ~(1 << token % 8)
        return bytes(bits)


def _narrow(request: PromptRequest) -> bool:
    """Whether even voluntary calls are bound: strict tools, or a choice among some."""
    return bool(request.tool_choice.names) or any(tool.strict for tool in request.tools)


class SchemaFailed(GenerationError):
    """A schema turned out too complex while the reply was written; `param` is its field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class _Constant:
    """Forbids the same tokens all the time."""

    def __init__(self, bits: bytes) -> None:
        self._bits = bits
        self.rules = bits.hex()

    def allowed(self) -> bytes | None:
        return self._bits

    def accept(self, token: int) -> None:
        pass


class _Grammar:
    """Follows a grammar from the first token."""

    def __init__(self, matcher: LLMatcher, param: str, grammar: str) -> None:
        self._matcher = matcher
        self._param = param
        self.rules = grammar

    def allowed(self) -> bytes | None:
        bits = self._matcher.compute_bitmask()
        self._check()
        return bits

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        reason = self._failed()
        if reason is not None:
            raise SchemaFailed(f"the reply cannot be held to its schema: {reason}", self._param)

    def _failed(self) -> str | None:
        if not self._matcher.is_error():
            return None
        return self._matcher.get_error().split("\n")[0][:300]


class _AfterThought:
    """Leaves the thought free and follows the grammar behind it."""

    def __init__(self, inner: _Grammar, think_end: int, before: bytes) -> None:
        self._inner = inner
        self._think_end = think_end
        self._before = before
        self._thinks = True
        self.rules = f"{think_end} {before.hex()} {inner.rules}"

    def allowed(self) -> bytes | None:
        return self._before if self._thinks else self._inner.allowed()

    def accept(self, token: int) -> None:
        if self._thinks:
            self._thinks = token != self._think_end
        else:
            self._inner.accept(token)


def _bits(count: int) -> bytes:
    whole, rest = divmod(count, 8)
    return b"\xff" * whole + (bytes([(1 << rest) - 1]) if rest else b"")


def _library_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """The same vocabulary for llguidance: bytes of every token, and which ones are special."""
    tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]

    class Wrapped:
        """What the library asks of a tokenizer."""

        def __init__(self) -> None:
            self.eos_token_id = tokenizer.eos_id
            self.bos_token_id = tokenizer.token_id("bos")
            self.tokens = tokens
            self.special_token_ids = sorted(tokenizer.special_ids)

        def __call__(self, text: str | bytes) -> list[int]:
            if isinstance(text, bytes):
                text = text.decode("utf-8", "replace")
            return tokenizer.encode(text)

    wrapped: Any = Wrapped()
    return LLTokenizer(TokenizerWrapper(wrapped), n_vocab=tokenizer.vocab_size)
