"""The page in a real browser: Debian's Chromium, driven as a person would."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator

import pytest

from fathom.chat import Tokenizer
from fathom.engine.llm import SHIPPED
from fathom.server.run import running
from fathom.server.scripted import Reply, ScriptedBackend
from fathom.server.settings import Settings

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.timeout(180),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
CALL = (
    '\n\n<\uff5cDSML\uff5ctool_calls>\n<\uff5cDSML\uff5cinvoke name="look_up">\n'
    '<\uff5cDSML\uff5cparameter name="word" string="true">tide</\uff5cDSML\uff5cparameter>\n'
    "</\uff5cDSML\uff5cinvoke>\n</\uff5cDSML\uff5ctool_calls>"
)
ANSWER = (
    "It **rises** twice a day:\n\n1. once by day\n2. once by night\n\n"
    "```python\nprint('tide')\n```\n"
)


def script(prompt: str) -> Reply | str:
    """What the engine says to the last message of a prompt."""
    said = prompt.rsplit("<\uff5cUser\uff5c>", 1)[-1]
    thinks = prompt.endswith("<think>")
    thought = "The user asks about the sea." + "</think>" if thinks else ""
    if "<tool_result>" in said:
        return Reply(text=f"{thought}The dictionary says so.", delay=0.002)
    if "look it up" in said:
        return Reply(text=f"{thought}I look.{CALL}", delay=0.002)
    if "slowly" in said:
        return Reply(text=thought + "one wave after another " * 400, delay=0.01)
    if "<script>" in said:
        return f"{thought}<img src=x onerror=\"document.title='owned'\"> [x](javascript:alert(1))"
    if "break" in said:
        return Reply(text=f"{thought}so far so", fail_after=4)
    return Reply(text=thought + ANSWER, delay=0.002)


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(script, Tokenizer.load(SHIPPED / "nano"))


@pytest.fixture(scope="module")
def address(backend: ScriptedBackend) -> Iterator[str]:
    with running(backend) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address: str) -> Iterator[Callable]:
    """Opens the page in a fresh profile; fails the test for errors on the console."""
    contexts, errors = [], []

    def open_(url: str = address, **options: object):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda m: errors.append(m.text) if m.type == "error" and "401" not in m.text else None,
        )
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert errors == []


def say(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def wait_idle(page) -> None:
    page.get_by_label("Send", exact=True).wait_for(state="visible")


def wait_written(page, count: int) -> int:
    """Wait until the last reply has more than `count` characters; the page allows no eval."""
    for _ in range(300):
        written = len(page.locator(".assistant .text").last.inner_text())
        if written > count:
            return written
        page.wait_for_timeout(50)
    raise AssertionError(f"no more than {count} characters arrived")


def test_a_message_streams_and_the_thought_folds(open_page: Callable) -> None:
    page = open_page()
    say(page, "Why is there a tide?")
    wait_idle(page)
    thought = page.locator("details.thought")
    assert re.fullmatch(r"Thought for \d+\.\d s", thought.locator("summary").inner_text())
    assert thought.get_attribute("open") is None  # folded once the answer has begun
    thought.locator("summary").click()
    assert thought.get_by_text("The user asks about the sea.").is_visible()
    assert page.locator(".text strong").inner_text() == "rises"
    assert page.locator(".text ol li").all_inner_texts() == ["once by day", "once by night"]
    assert page.locator(".text pre").inner_text() == "print('tide')"
    assert "tokens/s" in page.locator(".foot").inner_text()
    assert re.search(r"context \d+ of [\d,]+ tokens; prompt \d+, \d+ from the cache",
                     page.locator("#counters").inner_text())  # fmt: skip


def test_pieces_appear_while_they_are_written(open_page: Callable) -> None:
    page = open_page()
    say(page, "Speak slowly")
    page.locator(".assistant").wait_for()
    early = wait_written(page, 40)
    wait_written(page, early + 60)
    assert page.get_by_label("Stop", exact=True).is_visible()
    page.keyboard.press("Escape")
    wait_idle(page)


def test_stopping_frees_the_engine_and_the_conversation_goes_on(
    open_page: Callable, backend: ScriptedBackend
) -> None:
    page = open_page()
    cancelled = backend.cancelled
    say(page, "Speak slowly")
    page.locator(".assistant").wait_for()
    wait_written(page, 20)
    page.get_by_label("Stop", exact=True).click()
    wait_idle(page)
    assert "stopped" in page.locator(".foot").inner_text()
    for _ in range(100):  # the server finds out at the next thing that it writes
        if backend.cancelled > cancelled:
            break
        page.wait_for_timeout(50)
    assert backend.cancelled == cancelled + 1
    assert backend.running == 0
    say(page, "And now?")
    wait_idle(page)
    assert page.locator(".assistant").count() == 2
    assert page.locator(".assistant .text strong").count() == 1


def test_reload_and_continue(open_page: Callable, backend: ScriptedBackend) -> None:
    page = open_page()
    say(page, "Why is there a tide?")
    wait_idle(page)
    page.reload()
    assert page.locator(".user .bubble").inner_text() == "Why is there a tide?"
    assert page.locator(".assistant .text strong").inner_text() == "rises"
    say(page, "Go on")
    wait_idle(page)
    assert "Why is there a tide?" in backend.requests[-1].text
    assert page.locator(".assistant").count() == 2


@pytest.mark.parametrize(
    ("mode", "ending"), [("No thinking", "</think>"), ("High", "<think>"), ("Max", "<think>")]
)
def test_three_modes(open_page: Callable, backend: ScriptedBackend, mode: str, ending: str) -> None:
    page = open_page()
    page.get_by_role("radio", name=mode).check(force=True)
    say(page, "Why is there a tide?")
    wait_idle(page)
    prompt = backend.requests[-1].text
    assert prompt.endswith(ending)
    assert ("Reasoning Effort" in prompt) == (mode == "Max")
    assert page.locator("details.thought").is_visible() == (mode != "No thinking")


def set_tools(page, text: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools, a JSON list of functions").fill(text)
    page.get_by_role("button", name="Save").click()


def test_calls_and_results_are_cards(open_page: Callable, backend: ScriptedBackend) -> None:
    page = open_page()
    set_tools(page, json.dumps(TOOLS))
    say(page, "Please look it up")
    card = page.get_by_role("region", name="Call of look_up")
    card.get_by_label("Result of look_up").fill("The tide is the rise of the sea.")
    assert '"word": "tide"' in card.inner_text()
    card.get_by_role("button", name="Return this result").click()
    page.locator(".assistant .text", has_text="The dictionary says so.").wait_for()
    wait_idle(page)
    assert "The tide is the rise of the sea." in card.inner_text()
    prompt = backend.requests[-1].text
    assert "<tool_result>The tide is the rise of the sea.</tool_result>" in prompt
    assert prompt.count("The user asks about the sea.") == 1  # the thought went back with the call


def test_unreadable_tools_are_refused_in_place(open_page: Callable) -> None:
    page = open_page()
    set_tools(page, "[{")
    assert "cannot be read" in page.locator("#tools-error").inner_text()
    page.keyboard.press("Escape")


def test_the_exact_prompt(open_page: Callable) -> None:
    page = open_page()
    say(page, "Is <\uff5cUser\uff5c> special?")
    wait_idle(page)
    page.keyboard.press("Alt+p")
    page.locator("#prompt-facts").get_by_text("tokens").wait_for()
    shown = page.locator("#prompt-text")
    assert shown.inner_text().count("<\uff5cUser\uff5c>") == 2
    marked = shown.locator("mark").all_inner_texts()
    assert marked.count("<\uff5cUser\uff5c>") == 1  # the user's own is text
    assert "<\uff5cAssistant\uff5c>" in marked
    page.keyboard.press("Escape")
    assert not page.locator("#prompt-dialog").is_visible()


def test_what_a_model_writes_is_never_markup(open_page: Callable) -> None:
    page = open_page()
    say(page, "Write <script> please")
    wait_idle(page)
    assert "onerror" in page.locator(".assistant .text").inner_text()
    assert page.locator(".assistant img, .assistant a").count() == 0
    assert page.title() == "fathom"


def test_a_broken_engine_is_told_and_can_be_asked_again(open_page: Callable) -> None:
    page = open_page()
    say(page, "Please break")
    wait_idle(page)
    assert page.locator(".problem:visible").inner_text() != ""
    assert page.get_by_role("button", name="Try again").is_visible()


def test_a_key_is_asked_for(open_page: Callable, backend: ScriptedBackend) -> None:
    with running(backend, Settings(port=0, api_keys=("secret-key",))) as url:
        page = open_page(url)
        field = page.get_by_label("API key, kept until this tab closes")
        field.fill("secret-key")
        page.get_by_role("button", name="Save").click()
        page.locator("#model", has_text="scripted").wait_for()
        say(page, "Why is there a tide?")
        wait_idle(page)
        assert page.locator(".text strong").inner_text() == "rises"
        assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")


def test_dark_and_light(open_page: Callable) -> None:
    page = open_page(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("Change between light and dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_phone_fits_without_scrolling_sideways(open_page: Callable) -> None:
    page = open_page(viewport={"width": 375, "height": 700})
    say(page, "Why is there a tide?")
    wait_idle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_label("Open the list of conversations").click()
    page.get_by_role("button", name="New conversation").first.wait_for(state="visible")


def test_the_keyboard_is_enough(open_page: Callable) -> None:
    page = open_page()
    page.keyboard.type("Why is there a tide?")  # the message box has the focus
    page.keyboard.press("Enter")
    wait_idle(page)
    page.keyboard.press("Alt+n")
    assert page.locator(".assistant").count() == 0
    assert page.evaluate("document.activeElement.id") == "input"


def test_nothing_comes_from_elsewhere(open_page: Callable, address: str) -> None:
    asked: list[str] = []
    page = open_page("about:blank")
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    wait_idle(page)
    assert asked
    assert all(url.startswith((address, "data:")) for url in asked)
