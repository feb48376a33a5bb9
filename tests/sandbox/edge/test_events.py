"""Log lines: what a client sends cannot look like an event of its own."""

from __future__ import annotations

import logging

import pytest

from fathom.sandbox.edge.events import event


def test_what_is_not_plain_is_quoted(caplog: pytest.LogCaptureFixture):
    log = logging.getLogger("fathom.sandbox.test")
    evil = 'x\nlevel=INFO event=created id="sb-1" \x1b[31m'
    with caplog.at_level(logging.INFO, logger=log.name):
        event(log, logging.INFO, "failed", id="sb-1-ab", group=evil, empty="", long="y" * 9000)
        event(log, logging.DEBUG, "hidden")
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith('event=failed id=sb-1-ab group="x\\nlevel=INFO event=created')
    assert "\n" not in said
    assert "\x1b" not in said
    assert 'empty=""' in said
    assert len(said) < 1000
