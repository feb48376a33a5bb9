"""Text to token ids and back: a byte-level BPE that never mistakes data for markup.

Ordinary text is tokenized without its special tokens; they are placed by name or by the segments of
`encode_segments`. Official checkpoints bring their own tokenizer.json, our models one made by
`Tokenizer.train`; both are the same class here.

Paper: §5.1.1 (special tokens of the chat format, tool calls and quick instructions).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fathom.chat.encode import AnyMessage, PromptOptions, encode_segments
from fathom.chat.protocol import SPECIAL_TOKENS
from fathom.chat.segments import Segment
from fathom.errors import TokenizerError

FILE_NAME = "tokenizer.json"

# Quotes, slashes, dots and underscores stand alone, so that a path or a name splits the same way
# wherever it is quoted; the pairs before them are the glue of JSON and of tags, which never is part
# of a value. A digit is always one token.
_SPLIT = "|".join(
    (
        r"\p{N}",
        r" ?[\p{L}\p{M}]+",
        r'": ?"?|", "|=?">?|</',
        r"[\r\n]+",
        r"['/\\._`]",
        r""" ?[^\s\p{L}\p{M}\p{N}"'/\\._`]+""",
        r"[^\S\r\n]+(?!\S)",
        r"[^\S\r\n]+",
    )
)
_CACHED_LENGTH = 64
_LONG = 4096  # characters: beyond, the library must not keep other threads of Python waiting
_CACHE_SIZE = 1 << 16
_REPLACEMENT = "\ufffd".encode()


class Tokenizer:
    """A tokenizer, made by `load` or `train`."""

    def __init__(self, spec: str) -> None:
        """Read the text of a tokenizer.json. Raises TokenizerError if it is no byte-level BPE."""
        self._spec = spec
        try:
            data = json.loads(spec)
            added = {token["content"]: token["id"] for token in data["added_tokens"]}
            vocab: dict[str, int] = data["model"]["vocab"]
            self._plain = _without_special(data, added)
        except Exception as error:  # the library raises bare Exception for what it cannot read
            raise TokenizerError(f"not a BPE {FILE_NAME}: {error}") from error
        self._special: dict[str, int] = added
        self._special_ids = frozenset(added.values())
        self._pieces = _make_pieces(vocab, added)
        self.longest_token = max((len(piece) for piece in self._pieces if piece), default=1)
        longest_first = sorted(added, key=len, reverse=True)
        self._finder = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder. Raises TokenizerError if there is none."""
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        try:
            spec = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not there" if not file.exists() else str(error)
            raise TokenizerError(
                f"cannot read the tokenizer {file}: {reason}. A model needs one only for text; "
                f"pass token ids, or put its {FILE_NAME} there"
            ) from None
        return cls(spec)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
        """Learn merges from `texts`.

        The special tokens come first (bos 0, eos 1, pad 2), then the 256 bytes, then the merges. A
        small text may give fewer than `vocab_size` tokens. Raises TokenizerError if `vocab_size`
        leaves no room for the bytes.
        """
        special = list(SPECIAL_TOKENS.values())
        least = len(special) + 256
        if vocab_size < least:
            raise TokenizerError(f"vocab_size must be at least {least}: got {vocab_size}")
        tokenizer: Any = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[
                tokenizers.AddedToken(token, special=True, normalized=False) for token in special
            ],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_well_formed, texts), trainer)
        return cls(tokenizer.to_str(pretty=True))

    def save(self, folder: str | Path) -> Path:
        """Write tokenizer.json into `folder`, which is made if needed, and return its path."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        file = path / FILE_NAME
        file.write_text(self._spec, encoding="utf-8")
        return file

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._pieces)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sentence token."""
        return self.token_id("eos")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return self._special_ids

    def token_id(self, name: str) -> int:
        """Return the id of a special token by its short name ("eos", "dsml") or its text.

        Raises TokenizerError if this tokenizer has no such token.
        """
        token = SPECIAL_TOKENS.get(name, name)
        if token not in self._special:
            raise TokenizerError(f"this tokenizer has no special token {token!r}")
        return self._special[token]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of `text`. Only with `special` may spelled-out special tokens become one.

        Lone surrogates, which UTF-8 cannot hold, become U+FFFD.
        """
        if not special:
            return list(self._encode_plain(text))
        ids: list[int] = []
        at = 0
        for found in self._finder.finditer(text):
            ids += self._encode_plain(text[at : found.start()])
            ids.append(self._special[found[0]])
            at = found.end()
        return [*ids, *self._encode_plain(text[at:])]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, without special tokens; much faster than one by one."""
        found = self._plain.encode_batch_fast(
            [_well_formed(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in found]

    def encode_prompt(
        self,
        messages: Sequence[AnyMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[int]:
        """Return the ids of the prompt that `encode` would give with the same arguments.

        Text of messages, tools and arguments never becomes a special token, whatever it spells.
        Raises ChatError as `encode` does, TokenizerError if a needed special token is missing.
        """
        return self.encode_segments(encode_segments(messages, tools, **options))

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Return the ids of rendered segments. Raises TokenizerError for a token it lacks."""
        ids: list[int] = []
        for text, special, _ in segments:
            if special:
                ids.append(self.token_id(text))
            else:
                ids += self._encode_plain(text)
        return ids

    def encode_training(
        self, documents: Iterable[Iterable[Segment]]
    ) -> list[tuple[list[int], list[bool]]]:
        """Return for each document its ids and which of them the model generates.

        All texts of all documents go through the library in one batch, so give many at a time.
        """
        held = [list(document) for document in documents]
        texts = {part.text for document in held for part in document if not part.special}
        known = {text: self._cache[text] for text in texts if text in self._cache}
        unknown = [text for text in texts if text not in known]
        for text, ids in zip(unknown, self.encode_batch(unknown), strict=True):
            known[text] = ids
            self._remember(text, ids)
        result: list[tuple[list[int], list[bool]]] = []
        for document in held:
            ids: list[int] = []
            mask: list[bool] = []
            for text, special, generated in document:
                piece = [self.token_id(text)] if special else known[text]
                ids += piece
                mask += [generated] * len(piece)
            result.append((ids, mask))
        return result

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8, and unknown ids, become U+FFFD."""
        if skip_special:
            ids = (token for token in ids if token not in self._special_ids)
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token. An id without a token gives those of U+FFFD."""
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else None
        return _REPLACEMENT if piece is None else piece

    def incremental_decoder(self, skip_special: bool = False) -> IncrementalDecoder:
        """Return a decoder for a stream of ids."""
        return IncrementalDecoder(self, skip_special=skip_special)

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._cache.get(text)
        if ids is None:
            if len(text) > _LONG:
                return self.encode_batch([text])[0]
            ids = self._plain.encode(_well_formed(text), add_special_tokens=False).ids
            self._remember(text, ids)
        return ids

    def _remember(self, text: str, ids: list[int]) -> None:
        if len(text) > _CACHED_LENGTH:
            return
        if len(self._cache) >= _CACHE_SIZE:
            self._cache.clear()
        self._cache[text] = ids


class IncrementalDecoder:
    """Decodes ids one at a time and gives out only whole characters.

    All pieces joined, with that of `flush`, are the `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that became complete with this token."""
        if self._skip_special and token in self._tokenizer.special_ids:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """End the stream and return what is left: U+FFFD for an unfinished character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _without_special(data: dict[str, Any], added: Mapping[str, int]) -> Any:
    """Return the library's tokenizer with nothing in it that spells a special token."""
    model = data["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(data["decoder"]):
        raise TokenizerError(f"the model is {model['type']}, expected a byte-level BPE")
    vocab = {token: at for token, at in model["vocab"].items() if token not in added}
    plain: dict[str, Any] = data | {
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "model": model | {"vocab": vocab},
    }
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _make_pieces(vocab: Mapping[str, int], added: Mapping[str, int]) -> list[bytes | None]:
    """Return the bytes of every id; the file writes each byte as one printable character."""
    pieces: list[bytes | None] = [None] * (max([*vocab.values(), *added.values()]) + 1)
    of_character = _byte_of_character()
    for token, at in vocab.items():
        if token not in added and all(character in of_character for character in token):
            pieces[at] = bytes(of_character[character] for character in token)
    for token, at in added.items():
        pieces[at] = token.encode()
    return pieces


def _byte_of_character() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + at): byte for at, byte in enumerate(others)}


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
