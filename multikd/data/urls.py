"""What a user writes for a list of shards → their paths and addresses."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from multikd.data.remote import is_remote
from multikd.redaction import HIDDEN, redact

_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?$")
_MOST_URLS = 10_000_000


def expand_braces(text: str) -> list[str]:
    """``a{00..02}{x,y}`` → a00x, a00y, a01x, …; ranges keep their zeros; braces may be nested."""
    start = text.find("{")
    while start >= 0:
        end, commas = _closing(text, start)
        if end > 0:
            options = _options(text[start + 1 : end], [c - start - 1 for c in commas])
            if options:
                heads = [option for choice in options for option in expand_braces(choice)]
                tails = expand_braces(text[end + 1 :])
                if len(heads) * len(tails) > _MOST_URLS:
                    raise ValueError(f"{text!r} stands for more than {_MOST_URLS} shards")
                return [text[:start] + head + tail for head in heads for tail in tails]
        start = text.find("{", start + 1)
    return [text]


def _closing(text: str, start: int) -> tuple[int, list[int]]:
    """Where the brace at ``start`` closes (−1: nowhere), and its own commas."""
    depth = 0
    commas: list[int] = []
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i, commas
        elif text[i] == "," and depth == 1:
            commas.append(i)
    return -1, []


def _options(inside: str, commas: list[int]) -> list[str]:
    if commas:
        edges = [-1, *commas, len(inside)]
        return [inside[a + 1 : b] for a, b in itertools.pairwise(edges)]
    match = _RANGE.match(inside)
    if match is None:
        return []
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1) or 1
    if abs(last - first) // step > _MOST_URLS:
        raise ValueError(f"{{{inside}}} stands for more than {_MOST_URLS} shards")
    padded = any(
        len(end.lstrip("-")) > 1 and end.lstrip("-")[0] == "0" for end in match.group(1, 2)
    )
    width = max(len(match[1]), len(match[2])) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def expand_urls(spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The shards that a specification stands for, in order.

    Args:
        spec: a path or http(s) address, with brace ranges (``{000..146}``, ``{a,b}``); a local
            glob; a folder (all its ``*.tar``, sorted); or a list of these.

    Raises:
        ValueError: nothing is matched, a local shard does not exist, or the scheme is not read
            here (``pipe:`` belongs to the sequential mode).
    """
    if isinstance(spec, str | os.PathLike):
        spec = [spec]
    urls = [url for part in spec for url in _expand_one(os.fspath(part))]
    if not urls:
        raise ValueError("expected at least one shard, received an empty list")
    return urls


def _expand_one(text: str) -> list[str]:
    if not text.strip():
        raise ValueError("expected a path or address of shards, received an empty string")
    if is_remote(text):
        if HIDDEN in text:
            raise ValueError(
                f"the secret parts of {text!r} were taken out when it was written down: give the "
                "whole address again (--data.train=…)"
            )
        return expand_braces(text)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    elif text.startswith("pipe:"):
        raise ValueError(
            f"{redact(text)!r} is a command, whose output cannot be indexed: read it in the "
            "sequential mode"
        )
    elif re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", text):
        scheme = text.split(":", 1)[0]
        raise ValueError(
            f"cannot read {scheme}:// ({redact(text)!r}): expected a local path or http(s); mount "
            "or copy it, or read it through a pipe: source in the sequential mode"
        )
    text = os.path.expanduser(text)
    found: list[str] = []
    # A file or folder may really be called 'a{1,2}' or 'b[1]'.
    for path in [text] if os.path.exists(text) else expand_braces(text):
        if os.path.isdir(path):
            found += _tars_of(path)
        elif os.path.exists(path):
            found.append(path)
        elif glob.has_magic(path) and (matches := sorted(glob.glob(path, recursive=True))):
            found += matches
        else:
            what = "no shard matches" if glob.has_magic(path) else "there is no shard"
            raise ValueError(f"{what} {path!r} (from {text!r}): check the path")
    return found


def _tars_of(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    tars = [os.path.join(folder, name) for name in names if name.endswith(".tar")]
    if not tars:
        packed = [name for name in names if re.search(r"\.(tar\.\w+|tgz)$", name)]
        hint = (
            f"; {packed[0]!r} is compressed: decompress it or use the sequential mode"
            if packed
            else ": make shards with  multikd shards write"
        )
        raise ValueError(f"no shard matched: the folder {folder!r} holds no .tar{hint}")
    return tars
