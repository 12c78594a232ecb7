"""Passwords in texts: found however they are spelled, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest

from supervisor.redaction import passwords, remover


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql://app:s3cr3t@h/d", "s3cr3t"),
        ("postgresql://app:s3%20cr%223t@h/d", 's3 cr"3t'),
        ("postgresql://app:s3%20cr3t@h/d", "s3%20cr3t"),
        ("mysql://app:a/b?c@h/d", "a/b?c"),
        ("postgresql:///d?user=app&password=s3cr3t", "s3cr3t"),
        ("postgresql:///d?sslpassword=s3cr3t&x=1", "s3cr3t"),
        ("redis://:s3cr3t@h", "s3cr3t"),
    ],
)
def test_a_password_is_taken_out_in_each_spelling(url: str, word: str) -> None:
    """As it stands in the URL, as it is meant, in JSON and in a repr."""
    for spelled in (word, json.dumps(word), repr(word)):
        assert word not in remover([url])(f"server said {spelled}.")
    assert remover([url])(f"at {url}.").count("***") >= 1


@pytest.mark.parametrize("url", ["postgresql://app:app@h/d", "mysql://a:pw@h", "sqlite:///a.db"])
def test_words_that_are_everywhere_are_no_passwords(url: str) -> None:
    """What is very short, or stands elsewhere in its URL: texts would become unreadable."""
    assert passwords([url]) == ()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amqp://guest:guest@mq:5672/x", "amqp://guest:***@mq:5672/x"),
        ('{"a": "http://u:p@h/"}', '{"a": "http://u:***@h/"}'),
        ("http://h/?token=abc&x=1 end", "http://h/?token=***&x=1 end"),
        ("http://h:80/@someone", "http://h:80/@someone"),
        ('["http://h:80","a@b"]', '["http://h:80","a@b"]'),
        ("passed=3 token=abc", "passed=3 token=abc"),
        ("no url: a@b", "no url: a@b"),
    ],
)
def test_urls_lose_their_passwords_and_nothing_else(text: str, shown: str) -> None:
    """Of whatever scheme; what only looks like one stays."""
    assert remover(())(text) == shown
