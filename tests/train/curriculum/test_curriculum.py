"""Episodes: true, solved by their own checkers, tokenized as inference does, and repeatable."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

from fathom.chat import Tokenizer, parse
from fathom.errors import TrainError
from fathom.eval.tasks import BUILDERS, FAMILIES
from fathom.eval.tasks.task import contains
from fathom.train.curriculum import MAX_TOKENS, EpisodeStream, corpus, episode, training_task
from fathom.train.curriculum import oracle as scripts
from fathom.train.curriculum.episodes import tool_episode
from fathom.train.curriculum.oracle import SCRIPTS
from fathom.train.curriculum.prompt import GRAMMARS
from fathom.train.curriculum.sample import main as show
from fathom.train.curriculum.shell import Shell, quote

EPISODES = 400


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(corpus(1, 300), 1024)


@pytest.fixture(scope="module")
def episodes():
    return [episode(f"test/{number}", 0.6) for number in range(EPISODES)]


def kinds_of(drawn) -> list[str]:
    return drawn.kind.split("+")


def test_every_kind_has_a_script_and_wordings(episodes):
    assert SCRIPTS.keys() == GRAMMARS.keys()
    seen = {kind for drawn in episodes for kind in kinds_of(drawn)}
    assert len(seen & SCRIPTS.keys()) > 0.8 * len(SCRIPTS)
    assert {drawn.thinking for drawn in episodes} == {"high", "off"}


def test_an_oracle_that_answers_wrongly_is_noticed(monkeypatch):
    from fathom.eval.tasks.draw import Draw

    monkeypatch.setitem(
        scripts.SCRIPTS, "lines", lambda play, scenario: play.say("", "The answer is -1.")
    )

    def draw_many() -> None:
        for number in range(2000):
            tool_episode(Draw(f"wrong/{number}", evaluation=False))

    with pytest.raises(TrainError, match="lines answered"):
        draw_many()


def test_equal_seeds_give_equal_episodes(tokenizer):
    assert episode("a/1", 0.5) == episode("a/1", 0.5)
    assert episode("a/1", 0.5) != episode("a/2", 0.5)
    first, again = EpisodeStream(5, 1, 3, tokenizer), EpisodeStream(5, 1, 3, tokenizer)
    other = EpisodeStream(5, 2, 3, tokenizer)
    taken = list(itertools.islice(first, 40))
    assert taken == list(itertools.islice(again, 40))
    assert taken != list(itertools.islice(other, 40))
    with pytest.raises(ValueError, match="worker"):
        EpisodeStream(5, 3, 3, tokenizer)


def test_early_training_has_more_plain_recall():
    def recall(stage: float) -> int:
        return sum(episode(f"s/{n}", stage).family == "auxiliary" for n in range(600))

    assert 600 * 0.19 < recall(0.0) < 600 * 0.31
    assert recall(1.0) < 600 * 0.09


def test_prompts_of_the_agent_are_prefixes_of_the_episode(episodes, tokenizer):
    for drawn in episodes[:80]:
        ids, weights = drawn.to_tokens(tokenizer)
        assert len(ids) == len(weights)
        generated = 0
        for at, message in enumerate(drawn.messages):
            if message["role"] != "assistant":
                continue
            options = {"tools": drawn.tools, "thinking": drawn.thinking}
            before = tokenizer.encode_prompt(drawn.messages[:at], **options)
            after = tokenizer.encode_prompt(drawn.messages[: at + 1], **options)
            assert ids[: len(after)] == after
            assert after[: len(before)] == before
            assert after[-1] == tokenizer.eos_id
            assert set(weights[len(before) : len(after)]) == {1.0}
            generated += len(after) - len(before)
            reply = parse(tokenizer.decode(after[len(before) : -1]), thinking=drawn.thinking)
            assert reply.content == message["content"]
            assert reply.reasoning == message.get("reasoning_content", "")
            calls = [call["function"] for call in message.get("tool_calls", ())]
            assert [(c.name, c.arguments) for c in reply.tool_calls] == [
                (c["name"], c["arguments"]) for c in calls
            ]
        assert weights.count(1.0) == generated
        start = ids.index(tokenizer.token_id("user"))
        assert set(weights[:start]) <= {0.0}
        assert set(weights[start:]) == {0.1, 1.0}


def test_calls_follow_the_schemas_of_their_episode(episodes):
    for drawn in episodes:
        schemas = {t["function"]["name"]: t["function"] for t in drawn.tools or ()}
        for message in drawn.messages:
            for call in message.get("tool_calls", ()):
                parameters = schemas[call["function"]["name"]]["parameters"]
                arguments = json.loads(call["function"]["arguments"])
                assert list(arguments) == parameters["required"]


def test_episodes_are_short(tokenizer):
    stream = EpisodeStream(1, 0, 1, tokenizer)
    assert all(len(ids) <= MAX_TOKENS for ids, _ in itertools.islice(stream, 100))


def test_tasks_for_reinforcement_learning_check_their_oracle():
    tasks = [training_task(f"rl/{number}") for number in range(60)]
    assert {task.family for task in tasks} == set(FAMILIES)
    assert training_task("rl/7").prompt == tasks[7].prompt
    for task in tasks:
        assert not task.check("", task.files)
        if task.answer and task.family == "read":
            assert task.check(f"It is {task.answer}.", task.files)
            assert not task.check("It is unknown.", task.files)


def test_scenario_builders_leave_no_file_out():
    from fathom.eval.tasks.draw import Draw

    for family in FAMILIES:
        for name, (make, weight) in BUILDERS[family].items():
            files: dict[str, str] = {}
            scenario = make(Draw(f"b/{name}", evaluation=False), files)
            assert scenario.files is files
            assert weight > 0
            assert scenario.family == family


def test_the_shell_refuses_what_it_cannot_tell_exactly():
    shell = Shell({"a.txt": "x\n", "b.txt": "x\n"})
    with pytest.raises(ValueError, match="several files"):
        shell.grep_all("x")
    with pytest.raises(ValueError, match="several files"):
        shell.grep_files("x")
    with pytest.raises(ValueError, match="escapes"):
        quote('it\'s "quoted"')
    assert quote("it's") == '"it\'s"'


def test_the_editor_answers_like_the_agents():
    shell = Shell({"a.txt": "one two two\n"})
    assert shell.edit("b.txt", "x", "y") == "Error: b.txt does not exist"
    assert shell.edit("a.txt", "x", "y").startswith("Error: the text to replace was not found")
    assert "occurs 2 times" in shell.edit("a.txt", "two", "y")
    assert shell.edit("a.txt", "one", "1") == "Replaced 1 occurrence in a.txt"
    assert shell.edit("c.txt", "", "new") == "Created c.txt"
    assert shell.files == {"a.txt": "1 two two\n", "c.txt": "new"}


def test_sample_shows_episodes(capsys):
    assert show(["--n", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("===") == 2


@pytest.mark.parametrize(
    ("answer", "wanted", "found"),
    [
        ("The answer is 42.", "42", True),
        ("The answer is 142.", "42", False),
        ("The answer is 42.5.", "42", False),
        ("It is 1,042 lines", "1042", True),
        ("It is -42", "42", False),
        ("Yes, it is.", "yes", True),
        ("No, not yes.", "yes", False),
        ("The host is a.b.com.", "a.b.com", True),
        ("The code is K7Q-204.", "K7Q", False),
        ("It is PARIS.", "paris", True),
    ],
)
def test_answers_count_as_whole_tokens(answer, wanted, found):
    assert contains(answer, wanted) is found


def test_workers_start_without_torch():
    code = (
        "import sys, fathom.eval.tasks, fathom.train.curriculum, fathom.train.curriculum.verify;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
