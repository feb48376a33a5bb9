"""A long test of the parser: random completions in random pieces.

Half of the completions are canonical, rendered from a message that is therefore known; half are
damaged in places, and what the parser makes of them in one piece is compared with every division.
Each is read as text and with token ids. A failure says what it needs to be repeated.

Paper: none (a test).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fathom.chat.dsml import render_calls
from fathom.chat.events import (
    ArgumentsDelta,
    CallFinished,
    CallStarted,
    ContentDelta,
    ReasoningDelta,
)
from fathom.chat.messages import Message, ToolCall
from fathom.chat.protocol import DSML, EOS, SPECIAL_TOKENS, THINK, THINK_END, find_revision
from fathom.chat.segments import Segment
from fathom.chat.stream import StreamParser

SPLITS_PER_TEXT = 40
_MOST_CUTS = 24
_MOST_CUTS_OF_SEGMENT = 2  # a completion has dozens of segments
_WORDS: tuple[str, ...] = (
    "the", "answer", " ", "  ", "\n", "\n\n", "<", "</", ">", '"', "\\", "{", "}", "[1]", ": ",
    "\uff5c", "|", "<|DSML|", "\u2016DSML\u2016", "&lt;", "</think", "<thi", "\u4e16\u754c",
    "\U0001f980", "e\u0301", "\u2028", "\u202e", "\x00", "null", "true", "-0", "1e5", "```",
    "<tool_result>", "</tool_result>", "<\uff5cUser\uff5c", "parameter>", "invoke", "tool_calls",
)  # fmt: skip
_DAMAGE: tuple[str, ...] = (
    DSML, f"<{DSML}", f"</{DSML}", f"<{DSML}tool_calls>", f"</{DSML}tool_calls>",
    f'<{DSML}invoke name="f">', f"</{DSML}invoke>", f"</{DSML}parameter>", f"<{DSML}toolcalls>",
    f'<{DSML}parameter name="q" string="false">', f"<{DSML}parameter name='q'>", THINK, THINK_END,
    SPECIAL_TOKENS["fim_hole"], EOS, "<", "</", ">", '"', "\n\n",
)  # fmt: skip
_SPELLED = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS.values()))})")


@dataclass(slots=True)
class FuzzReport:
    """What a run found. `failures` describes the first five of each kind."""

    seed: int
    splits: int = 0
    texts: int = 0
    calls: int = 0
    repaired: int = 0
    leaks: int = 0
    lost_calls: int = 0
    invalid_json: int = 0
    differences: int = 0
    lost_words: int = 0
    failures: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not (
            self.leaks
            or self.lost_calls
            or self.invalid_json
            or self.differences
            or self.lost_words
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A completion in segments. `message` is what it says, None if it was damaged."""

    number: int
    segments: list[Segment]
    message: Message | None
    words: list[str]

    @property
    def text(self) -> str:
        """The completion as text."""
        return "".join(segment.text for segment in self.segments)


def run(splits: int, seed: int = 0, splits_per_text: int = SPLITS_PER_TEXT) -> Iterator[FuzzReport]:
    """Divide completions `splits` times in all; yield the report so far after each completion."""
    report = FuzzReport(seed)
    while report.splits < splits:
        rng = random.Random(f"{seed}/{report.texts}")
        sample = make_sample(rng, report.texts)
        report.texts += 1
        check(sample, rng, min(splits_per_text, splits - report.splits), report)
        yield report


def make_sample(rng: random.Random, number: int) -> Sample:
    """Return a random completion; every second one is damaged."""
    words = _Words(rng)
    calls = [_call(rng, words) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    message = Message(reasoning=words.prose(), content=words.prose(), tool_calls=calls)
    segments = [Segment(message.reasoning), Segment(THINK_END, special=True)]
    segments.append(Segment(str(message.content)))
    if calls:
        segments += [Segment("\n\n"), *render_calls(calls, find_revision("0731"))]
    segments.append(Segment(EOS, special=True))
    if number % 2 == 0:
        return Sample(number=number, segments=segments, message=message, words=words.made)
    text = _damage(rng, "".join(segment.text for segment in segments))
    found = [word for word in words.made if text.count(word) == 1]
    return Sample(number=number, segments=_divide(text), message=None, words=found)


def check(sample: Sample, rng: random.Random, splits: int, report: FuzzReport) -> None:
    """Read a completion in one piece and in `splits` divisions, and add what is wrong."""
    whole = {by_id: _parse(_whole(sample, by_id)) for by_id in (False, True)}
    for by_id, message in whole.items():
        _judge(sample, message, report, by_id)
    for _ in range(splits):
        by_id = rng.random() < 0.5
        streams = rng.random() < 0.5
        message = _read(_pieces(sample, rng, by_id), streams=streams)
        if message is None:
            _fail(report, sample, "leaks", by_id)
            message = whole[by_id]
        report.splits += 1
        report.calls += len(message.tool_calls)
        report.repaired += sum(call.repaired for call in message.tool_calls)
        if message != whole[by_id] or message.diagnostics != whole[by_id].diagnostics:
            _fail(report, sample, "differences", by_id)
            _judge(sample, message, report, by_id)


def _judge(sample: Sample, message: Message, report: FuzzReport, by_id: bool) -> None:
    for call in message.tool_calls:
        if not _is_object(call.arguments):
            _fail(report, sample, "invalid_json", by_id)
    if sample.message is not None:
        if message.tool_calls != sample.message.tool_calls:
            _fail(report, sample, "lost_calls", by_id)
        if DSML in message.reasoning or DSML in message.content:
            _fail(report, sample, "leaks", by_id)
        if message != sample.message or message.diagnostics:
            _fail(report, sample, "differences", by_id)
    kept = [message.reasoning, str(message.content)]
    kept += [call.name + call.arguments for call in message.tool_calls]
    kept += [diagnostic.text for diagnostic in message.diagnostics]
    joined = "\n".join(kept)
    for word in sample.words:
        if joined.count(word) != 1:
            _fail(report, sample, "lost_words", by_id)


def _parse(pieces: list[tuple[str, bool | None]]) -> Message:
    parser = StreamParser("high")
    for text, special in pieces:
        parser.feed(text, special)
    parser.close()
    return parser.message


def _read(pieces: list[tuple[str, bool | None]], *, streams: bool) -> Message | None:
    """Return the message as its events tell it.

    None if they tell prose behind a call, more of a call than it says, or the end of a call that
    is not whole.
    """
    parser = StreamParser("high", stream_arguments=streams)
    events = [event for text, special in pieces for event in parser.feed(text, special)]
    events += parser.close()
    texts = {"reasoning": "", "content": ""}
    calls: list[ToolCall] = []
    arguments: dict[int, str] = {}
    for event in events:
        match event:
            case ReasoningDelta(text) | ContentDelta(text):
                if arguments:
                    return None
                texts["reasoning" if isinstance(event, ReasoningDelta) else "content"] += text
            case CallStarted(index=index):
                arguments[index] = ""
            case ArgumentsDelta(index=index, text=text):
                arguments[index] += text
            case CallFinished(index=index, call=call):
                told = arguments.get(index, "")
                if not (call.partial or call.repaired):
                    call = replace(call, arguments=told)
                elif _is_object(told) or not call.arguments.startswith(told):
                    return None
                calls.append(call)
            case _:
                pass
    return Message(
        reasoning=texts["reasoning"],
        content=texts["content"],
        tool_calls=calls,
        diagnostics=parser.message.diagnostics,
    )


def _whole(sample: Sample, by_id: bool) -> list[tuple[str, bool | None]]:
    if by_id:
        return [(segment.text, segment.special) for segment in sample.segments]
    return [(sample.text, None)]


def _pieces(sample: Sample, rng: random.Random, by_id: bool) -> list[tuple[str, bool | None]]:
    """Return the completion in random pieces; a special token is never divided."""
    if not by_id:
        return [(piece, None) for piece in _cut(sample.text, rng)]
    pieces: list[tuple[str, bool | None]] = []
    for segment in sample.segments:
        if segment.special:
            pieces.append((segment.text, True))
        else:
            pieces += [(piece, False) for piece in _cut(segment.text, rng, _MOST_CUTS_OF_SEGMENT)]
    return pieces


def _cut(text: str, rng: random.Random, most: int = _MOST_CUTS) -> list[str]:
    draw = rng.random
    if draw() < 0.04:
        return list(text)
    size = len(text) + 1
    cuts = sorted(int(draw() * size) for _ in range(int(draw() * (most + 1))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


class _Words:
    """Makes texts, with a word in each that can be found again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.made: list[str] = []

    def text(self) -> str:
        rng = self._rng
        parts: list[str] = rng.choices(_WORDS, k=rng.randint(0, 9))
        word = f"w{len(self.made)};"
        self.made.append(word)
        parts.insert(rng.randint(0, len(parts)), word)
        return "".join(parts)

    def prose(self) -> str:
        """Return text that holds no marker: the parts of one may meet by chance."""
        text = self.text() if self._rng.random() < 0.9 else ""
        return text.replace(THINK_END, "").replace(DSML, "")


def _call(rng: random.Random, words: _Words) -> ToolCall:
    arguments: dict[str, object] = {}
    others: tuple[object, ...] = ([1, {"a": None}], -0.5, 10**25, True, "")
    for at in range(rng.randint(0, 3)):
        fixed = rng.choice(others)
        arguments[f"k{at}"] = words.text() if rng.random() < 0.6 else fixed
    return ToolCall(
        name=rng.choice(("bash", "read_file", "f-1")),
        arguments=json.dumps(arguments, ensure_ascii=False),
    )


def _damage(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(text))
        what = rng.random()
        if what < 0.5:
            text = text[:at] + rng.choice(_DAMAGE) + text[at:]
        elif what < 0.8:
            text = text[:at] + text[at + rng.randint(1, 12) :]
        else:
            text = text[:at]
    return text


def _divide(text: str) -> list[Segment]:
    """Return text in which every spelled token is a special one, as a model would write it."""
    pieces = _SPELLED.split(text)
    return [Segment(piece, special=at % 2 == 1) for at, piece in enumerate(pieces) if piece]


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def _fail(report: FuzzReport, sample: Sample, what: str, by_id: bool) -> None:
    setattr(report, what, getattr(report, what) + 1)
    if sum(line.startswith(what) for line in report.failures) < 5:
        reading = "ids" if by_id else "text"
        report.failures.append(
            f"{what}: seed {report.seed}, text {sample.number}, read by {reading}: {sample.text!r}"
        )
