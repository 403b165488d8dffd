"""Logs: one form for everyone's lines, and nothing from a request that starts a line or drives a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.printable import escape_controls

REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}

SCRIPT = """
import logging, sys, warnings
import structlog
from server.logs import configure_logging
configure_logging(sys.argv[1], sys.argv[2])
structlog.get_logger("ours").info("told\\nfalsely", path="/x\\r\\nForged: yes\\x1b[31m", count=1)
logging.getLogger("uvicorn.error").warning("cut %d", 5, extra={"color_message": "in colour"})
logging.getLogger("uvicorn.access").info("not twice")
logging.getLogger("httpx").info("not told")
logging.getLogger("watchfiles.main").info("nor this")
logging.getLogger("other").debug("details")
with structlog.contextvars.bound_contextvars(request_id="r1"):
    structlog.get_logger("ours").warning("bound")
warnings.warn("careful")
structlog.get_logger("ours").info("nested", served=["a\u202eb", {"c": "d\x1b"}])
secret = "s3cret"
try:
    raise ValueError("wr\u2066ong\x1b[31m")
except ValueError:
    logging.getLogger("other").exception("failed")
"""


def run(level: str, log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, level, log_format], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_lines() -> None:
    lines = [json.loads(line) for line in run("info", "auto")]
    assert [line["event"] for line in lines][:3] == ["told\\nfalsely", "cut 5", "bound"]
    first = lines[0]
    assert first["path"] == "/x\\r\\nForged: yes\\x1b[31m"
    assert (first["level"], first["logger"], first["count"]) == ("info", "ours", 1)
    assert "color_message" not in lines[1]
    assert lines[2]["request_id"] == "r1"
    assert "careful" in lines[3]["event"]
    assert lines[4]["served"] == ["a\\u202eb", {"c": "d\\x1b"}]
    assert lines[5]["exception"].endswith("ValueError: wr\\u2066ong\\x1b[31m")
    assert len(lines) == 6


def test_console_lines() -> None:
    lines = run("info", "console")
    assert "told\\nfalsely" in lines[0]
    assert not any(line.startswith("Forged") or "\x1b" in line or "\u2066" in line for line in lines)
    assert lines[-1] == "ValueError: wr\\u2066ong\\x1b[31m"
    assert "s3cret" not in "\n".join(lines), "a traceback shows no values of variables"


def test_levels() -> None:
    assert [json.loads(line)["event"] for line in run("error", "json")] == ["failed"]
    events = [json.loads(line)["event"] for line in run("debug", "json")]
    assert "details" in events
    assert "not told" in events, "debug shows the libraries' own lines too"
    assert "not twice" not in events


@given(st.text())
def test_escaped_text_is_one_line_that_drives_nothing(text: str) -> None:
    escaped = escape_controls(text)
    assert len(escaped.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in escaped)
    assert not any(unicodedata.bidirectional(char) in REORDERING for char in escaped)
    escaped.encode()
    assert escape_controls(escaped) == escaped


@pytest.mark.parametrize(
    "text",
    ["plain", "naïve café", "日本語 🙂", "עברית", "👩\u200d🚀", "a\u200cb", 'back\\slash "quoted"'],
)
def test_text_without_controls_is_left_as_it_is(text: str) -> None:
    assert escape_controls(text) == text


@pytest.mark.parametrize("char", ["\u202e", "\u2066", "\u200f", "\u061c", "\u200b", "\ufeff", "\ud800"])
def test_text_that_hides_or_reorders_is_shown(char: str) -> None:
    assert escape_controls(f"a{char}b") == f"a{char.encode('unicode-escape').decode()}b"


def test_kept_controls_are_kept() -> None:
    assert escape_controls("a\n\tb\r\x1b", keep="\n\t") == "a\n\tb\\r\\x1b"
