"""The page with sandboxes and runs: what it tells to whom, and how it looks in a real browser."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from fathom.errors import SandboxError
from fathom.sandbox.pages import Pages

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


def entry(name: str, parent: str = "", **more: Any) -> dict[str, Any]:
    spec = {"image": "base", "memory": "64MiB", "cpu": None, "pids": 32, "disk": None}
    net = {
        "addresses": [["10.0.0.1", 443]],
        "domains": [["a.example", [443], False]],
        "mirrors": ["pypi"],
    }
    base = {"id": name, "parent": parent, "spec": spec, "net": net, "created": 1.7e9, "phase": ""}
    return {**base, "caps": {"substrate": "crun"}, "group": "", "paused": False, **more}


RUN = {"run": "r-1", "state": "ended", "operations": 2, "begun_ns": 1.7e18, "task": f"do {EVIL}"}
EVENTS = [
    {"kind": "intent", "key": "s1", "request": {"arguments": {"command": f"echo {EVIL}"}}},
    {"kind": "receipt", "key": "s1", "outcome": {"exit_code": 3, "stdout": EVIL, "stderr": "oh"}},
    {"kind": "unknown", "key": "s2", "fields": {"reason": "the agent ended"}},
]


def overview() -> dict[str, Any]:
    boxes = [entry("sb-1", group=EVIL), entry("sb-2", "sb-1", paused=True), entry("sb-3", "sb-2")]
    return {"sandboxes": [*boxes, entry("sb-4", "gone")], "runs": [RUN]}


def run(name: str) -> dict[str, Any]:
    if name != "r-1":
        raise SandboxError(f"there is no run {name}")
    return {**RUN, "events": EVENTS}


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages(overview, run)
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    made.close()
    thread.join()


def get(pages: Pages, path: str, **headers: str) -> tuple[int, bytes]:
    where = urlsplit(pages.address)
    line = http.client.HTTPConnection(str(where.hostname), where.port, timeout=10)
    try:
        line.request("GET", path, headers=headers)
        answer = line.getresponse()
        return answer.status, answer.read()
    finally:
        line.close()


def test_data_is_for_who_has_the_key(pages: Pages):
    assert get(pages, "/")[0] == 200
    with_key = {"Authorization": f"Bearer {pages.key}"}
    for path in ("/overview", "/runs/r-1"):
        assert get(pages, path)[0] == 401
        assert get(pages, path, Authorization=f"Bearer {pages.key[:-1]}")[0] == 401
        assert get(pages, path, **with_key)[0] == 200
    assert json.loads(get(pages, "/runs/r-1", **with_key)[1])["events"] == EVENTS
    assert get(pages, "/runs/other", **with_key)[0] == 400
    for path in ("/runs/../../etc/passwd", "/runs/a%2fb", "/../pages.py", "/page/index.html"):
        assert get(pages, path, **with_key)[0] == 404
    assert get(pages, "/", Host="evil.example:80")[0] == 403


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.timeout(120)
def test_in_a_browser(pages: Pages):
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda said: problems.append(said.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(pages.address)
        page.wait_for_selector("#boxes li")
        # The tree of copies: each below its origin; one whose origin is gone stands by itself.
        assert page.locator("#boxes > li").count() == 2
        assert page.locator("[data-id=sb-1] > ul > [data-id=sb-2] > ul > [data-id=sb-3]").count()
        assert "10.0.0.1:443, a.example, mirror pypi" in page.inner_text("[data-id=sb-4]")
        assert "paused" in page.inner_text("[data-id=sb-2] > .card")
        page.click("#runs button")
        page.wait_for_selector("#steps li")
        shown = page.inner_text("#run")
        assert "exit 3" in shown
        assert EVIL in shown
        assert "the agent ended" in shown
        assert page.title() == "fathom: sandboxes"
        assert problems == []
        browser.close()
