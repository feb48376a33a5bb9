"""Load a model and generate text with it; everything runs on the engine.

    llm = fathom.load("nano")
    print(llm.generate("Once", max_tokens=20).text)

Reading order: load -> LLM.stream -> Generation (pieces.py) -> Engine.step.

Paper: none (inference interface).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import anyio
import anyio.to_thread
import torch

from fathom.chat import Tokenizer
from fathom.chat.generation import TokenMask
from fathom.checkpoint import Checkpoint, load_model, load_stored, open_checkpoint
from fathom.checkpoint.stored import unstorable_checkpoint
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.options import check_tokens
from fathom.engine.pieces import Completion, Generation, TokenPiece
from fathom.engine.sampler import SamplingParams
from fathom.engine.stored_fit import unserved
from fathom.errors import ConfigError, GenerationError, TokenizerError
from fathom.kernels.device import named_device
from fathom.model.config import PRESETS
from fathom.model.stored import StoredModel
from fathom.model.stored_prompt import prompt_logits, prompt_mtp_logits
from fathom.model.transformer import Transformer

if TYPE_CHECKING:
    from fathom.chat.reply import Reply

_log = logging.getLogger(__name__)
SHIPPED = Path(__file__).resolve().parent.parent / "assets"  # models that come with the package


def load(
    path_or_preset: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantized: bool | None = None,
    engine: EngineConfig | None = None,
) -> LLM:
    """Load a checkpoint folder, or a shipped model by name ("nano").

    dtype: arithmetic of activations, torch.float32 or torch.bfloat16 (default: float32 on the CPU,
    bfloat16 elsewhere). quantized: True performs every quantisation step of the official path,
    False none, None does what the checkpoint was made for. A folder without tokenizer.json loads
    too; only text needs one. engine: memory, cache folders, drafting. On a GPU that serves from
    stored formats, weights are read as they are stored. Raises CheckpointError, ConfigError or
    UnsupportedModelError.
    """
    folder = _folder(path_or_preset)
    device = named_device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    checkpoint = open_checkpoint(folder)
    if _read_as_stored(checkpoint, device, dtype, quantized):
        model = load_stored(checkpoint, device=device, dtype=dtype)
    else:
        model = load_model(checkpoint, dtype=dtype, quantized=quantized, device=device)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(folder) if has_tokenizer else None
    return LLM(model, tokenizer, name=folder.name, engine=engine)


def _read_as_stored(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, quantized: bool | None
) -> bool:
    """Whether a GPU serves a checkpoint's bytes as they are; the log says why it does not."""
    if device.type != "cuda" or quantized is False:
        return False
    reason = unserved(device, checkpoint.config, dtype) or unstorable_checkpoint(checkpoint)
    if reason is not None:
        _log.warning("event=dequantised folder=%r reason=%r", str(checkpoint.folder), reason)
    return reason is None


def _folder(path_or_preset: str | Path) -> Path:
    folder = Path(path_or_preset)
    if folder.is_dir():
        return folder
    if folder.exists():
        if folder.suffix not in (".json", ".safetensors"):
            raise ConfigError(
                f"{folder} is no file of a checkpoint: give the folder that holds its config.json"
            )
        return folder.parent
    name = str(path_or_preset)
    if (SHIPPED / name / "config.json").is_file():
        return SHIPPED / name
    if name in PRESETS:
        raise ConfigError(
            f"{name} is a known configuration, but its weights do not come with fathom: give the "
            "folder that holds its config.json and safetensors files"
        )
    raise ConfigError(f"no folder {name!r}, and no shipped model of that name (there is: nano)")


class LLM:
    """A model, its tokenizer (or None) and an engine, which threads may share.

    The engine, with memory of its own, is made when it is first needed.
    """

    def __init__(
        self,
        model: Transformer | StoredModel,
        tokenizer: Tokenizer | None,
        name: str = "model",
        engine: EngineConfig | None = None,
    ) -> None:
        self.model = model.eval()
        self.config = model.config
        self.name = name
        self._tokenizer = tokenizer
        self._engine_config = engine
        self._engine: Engine | None = None
        self._making = threading.Lock()

    @property
    def engine(self) -> Engine:
        """What `generate`, `stream` and `chat` run on; see fathom.engine.Engine."""
        if self._engine is None:
            with self._making:
                if self._engine is None:
                    self._engine = Engine(self.model, self._engine_config)
        return self._engine

    @property
    def started(self) -> bool:
        """Whether the engine has been made."""
        return self._engine is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError when the checkpoint came without one."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self.name} has no tokenizer.json: pass token ids instead of text, or add it"
            )
        return self._tokenizer

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of every position of one prefill without any cache: float32 [tokens, vocab].

        Raises GenerationError for an empty or too long list, or ids outside the vocabulary.
        """
        ids = self._tensor(self._check(token_ids))
        if isinstance(self.model, StoredModel):
            return prompt_logits(self.model, ids[0])
        return self.model(ids)[0].cpu()

    @torch.inference_mode()
    def mtp_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The MTP block's logits, float32 [tokens - 1, vocab]; row p reads p + 1, predicts p + 2.

        Raises GenerationError for fewer than two ids, ConfigError for a model without MTP block.
        """
        ids = self._check(token_ids)
        if len(ids) < 2:
            raise GenerationError("mtp_logits needs at least two tokens")
        if isinstance(self.model, StoredModel):
            return prompt_mtp_logits(self.model, self._tensor(ids)[0])
        return self.model.mtp_logits(self._tensor(ids))[0].cpu()

    @overload
    def generate(self, prompt: str | Sequence[int], *args: Any, **kwargs: Any) -> Completion: ...

    @overload
    def generate(
        self, prompt: list[str] | Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | list[str] | Sequence[Sequence[int]],
        max_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        **settings: Any,
    ) -> Completion | list[Completion]:
        """Complete a prompt: text (special tokens in it are recognised) or token ids.

        A list of prompts is computed together and gives a list; each result is what it would be
        alone. Stops at the end-of-sentence token or one of stop_token_ids. `settings`: everything
        else of SamplingParams. Raises GenerationError for impossible values or a prompt longer than
        the context, TokenizerError for text without tokenizer.
        """
        several = not isinstance(prompt, str) and any(isinstance(p, Sequence) for p in prompt)
        prompts: Sequence[Any] = prompt if several else [prompt]
        runs = [
            self.stream(p, max_tokens, temperature, top_p, seed, stop_token_ids, **settings)
            for p in prompts
        ]
        for run in runs:
            run.begin()
        done = [run.complete() for run in runs]
        return done if several else done[0]

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        *,
        mask: TokenMask | None = None,
        priority: int = 0,
        pin: bool = False,
        **settings: Any,
    ) -> Generation:
        """As `generate`, as an iterator of TokenPiece; its attributes say how it ended.

        mask says before each token which ones are allowed; priority: lower goes first; pin keeps
        the cache of its end. Several may be iterated in turns; they are computed together.
        """
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, special=True)
        ids = self._check(prompt)
        try:
            params = SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=max_tokens,
                stop_token_ids=(self.config.eos_token_id, *stop_token_ids),
                **settings,
            )
        except TypeError as error:
            raise GenerationError(f"no such setting: {error}") from error
        return Generation(self, ids, params, {"mask": mask, "priority": priority, "pin": pin})

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[TokenPiece]:
        """`stream` for an event loop: tokens are computed in worker threads.

        Several at once are computed together.
        """
        run = self.stream(*args, **kwargs)
        try:
            while True:
                piece = await anyio.to_thread.run_sync(next, run, None)
                if piece is None:
                    return
                yield piece
        finally:
            with anyio.CancelScope(shield=True):  # it may have to wait for a step
                await anyio.to_thread.run_sync(run.close)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
        max_tokens: int | None = None,
        **sampling: Any,
    ) -> Reply:
        """Answer a conversation: messages and tools in the OpenAI shape, the parsed reply back.

        sampling: temperature, top_p, seed. Raises ChatError for messages that cannot be rendered,
        TokenizerError without tokenizer, GenerationError for impossible values.
        """
        from fathom.chat.reply import Sampling
        from fathom.engine.chat_model import LocalModel

        return LocalModel(self).reply(
            messages,
            tools=tools,
            thinking=thinking,
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
        )

    def _check(self, token_ids: Sequence[int]) -> list[int]:
        ids = list(token_ids)
        check_tokens(ids, self.config)
        return ids

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.model.embed.weight.device)
