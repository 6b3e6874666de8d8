"""One place that takes secrets out of text before it is shown or written."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
"""Stands where a secret was."""

# Scheme, then what may be user and password, host and path, query and fragment.
_ADDRESS = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?P<user>[^/?#\s'\"<>]*@)?"
    r"(?P<path>[^\s'\"<>?#]*)"
    r"(?P<query>[?#][^\s'\"<>]+)?"
)
# What a command line or a header says beside addresses.
_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization\s*[:=]\s*)(?:(bearer|basic|token)\s+)?[^\s'\"]+"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}")
_CURL_USER = re.compile(r"((?:^|\s)(?:-u|--user)[\s=]+['\"]?)[^\s'\"]+")
_NAMED = re.compile(
    r"(?i)(?<![A-Za-z0-9_])("
    r"x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|sig|signature"
    r"|(?:access_?|auth_?|api_?|refresh_?|secret_?|session_?)?(?:token|key)"
    r"|aws_(?:access_key_id|secret_access_key|session_token)"
    r"|pass(?:word|wd)?|pwd|secret)=(?!\*\*\*)[^\s&'\",;)]+"
)


def redact(text: str) -> str:
    """``text`` with ``***`` for what may be a secret in it.

    Of every address the user and password and the whole query (a signature, a token) go; of
    commands also ``Authorization:`` headers, ``curl -u`` and ``token=…``.
    """
    if "://" in text:
        text = _ADDRESS.sub(_public, text)
    text = _HEADER.sub(lambda m: f"{m[1]}{HIDDEN}", text)
    text = _BEARER.sub(lambda m: f"{m[1]}{HIDDEN}", text)
    text = _CURL_USER.sub(lambda m: f"{m[1]}{HIDDEN}", text)
    return _NAMED.sub(lambda m: f"{m[1]}={HIDDEN}", text)


def _public(match: re.Match[str]) -> str:
    user = f"{HIDDEN}@" if match["user"] else ""
    query = f"{match['query'][0]}{HIDDEN}" if match["query"] else ""
    return f"{match['scheme']}{user}{match['path']}{query}"


def redact_values(value: Any) -> Any:
    """A config or record of plain values with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value
