"""One sentence out of jsonargparse's tree of what did not validate.

jsonargparse reports every branch of every union it tried, which is complete and hard to read. A
user needs the path of the key, what is wrong with it, and the nearest right name.

The report is an indented tree: ``Parser key "…"`` opens a key, ``Problem with given class_path
'…'`` a class, and leaves say what is wrong. The deepest leaf is the branch that was meant.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

from multikd.errors import nearest
from multikd.imports import denied, refusal

_KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':?")
_CALLABLE = re.compile(r"Type typing\.Callable\[.*?\] expects a function or a callable class: ")
_GIVEN_CLASS = re.compile(r"class_path='([^']+)'")
_OPTION = re.compile(r"(?:Group '([^']+)' does not accept option|Option) '([^']+)'")
_COMMAND_OPTION = re.compile(r"Subcommand '[^']+' does not accept option '([^']+)'")
_UNRECOGNISED = re.compile(r"unrecognized arguments: (.+)", re.DOTALL)
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_NO_IMPORT = re.compile(r"Expected a dot import path string: (.+)")
_NO_ATTRIBUTE = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
_NO_MODULE = re.compile(r"No module named '([^']+)'")
# In a union's branch jsonargparse cuts the value out of the sentence.
_WRONG_BASE = re.compile(r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)")
_EXPECTED = re.compile(r"Expected an? (.+)")
_RECEIVED = re.compile(r"\. Got value: (.*)$")
_NESTED_VALUE = re.compile(r"NestedArg\(key='[^']*', val=(.*)\)$")
_SUBTYPES = re.compile(r"<class '([\w.]+)'>|(?<=[\[ ])([\w]+(?:\.[\w]+)+)(?=[\],])")

_PLAIN_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
_MOST = 400


@dataclass
class _Leaf:
    """One thing that jsonargparse says is wrong, and where."""

    indent: int
    path: tuple[str, ...]
    owner: str | None
    bases: tuple[str, ...]
    depth: int
    text: str
    received: str | None = None


def condense(message: str, known: Iterable[str] = ()) -> str:
    """A readable sentence for a jsonargparse message; unknown forms pass, on one line.

    Args:
        message: what jsonargparse says.
        known: option names of the parser (``--trainer.max_epochs``), to offer the nearest of.
    """
    options = sorted({o.lstrip("-") for o in known if not o.endswith(("+", ".help"))})
    unrecognised = _UNRECOGNISED.search(message)
    if unrecognised:
        return _unrecognised(unrecognised.group(1).split(), options)
    outside = _COMMAND_OPTION.search(message)
    if outside:
        return _no_key(outside.group(1), options)
    leaves = _leaves(message)
    for leaf in leaves:
        if path := denied(leaf.text):
            where = ".".join(leaf.path)
            return f"{where}: {refusal(path)}" if where else refusal(path)
    if not leaves:
        return _one_line(message)
    deepest = max(leaf.depth for leaf in leaves)
    if deepest == 0 and not (_OPTION.search(message) or _REQUIRED.search(message)):
        return _one_line(message)
    meant = [leaf for leaf in leaves if leaf.depth == deepest]
    where = ".".join(meant[0].path)
    meant = [leaf for leaf in meant if ".".join(leaf.path) == where]
    text = _sentence(meant, where, options)
    return text if not where or text.startswith(where) else f"{where}: {text}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST else line[: _MOST - 2] + " …"


def _leaves(message: str) -> list[_Leaf]:
    """The leaves of the report, each with the keys and the class that lead to it."""
    frames: list[tuple[int, str, str]] = []  # (indent, kind, value)
    bases: dict[int, tuple[str, ...]] = {}
    leaves: list[_Leaf] = []
    for line in message.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not text or text.startswith(("Errors:", "Given value type:")):
            continue
        if text.startswith("Subtypes:"):
            bases[indent] = tuple(a or b for a, b in _SUBTYPES.findall(text))
            continue
        if text.startswith("Given value:"):
            _set_received(leaves, indent, text.removeprefix("Given value:").strip())
            continue
        frames = [frame for frame in frames if frame[0] < indent]
        text = text.removeprefix("- ")
        if text.startswith("Does not validate against any of the Union"):
            continue
        wrapped = _CALLABLE.match(text)
        if wrapped:
            text = text[wrapped.end() :]
            given = _GIVEN_CLASS.search(text)
            if given:
                frames.append((indent, "class", given.group(1)))
        for kind, pattern in (("key", _KEY), ("class", _CLASS), ("key", _KEY)):
            found = pattern.match(text)
            if found:
                frames.append((indent, kind, found.group(1)))
                text = text[found.end() :].strip()
        if not text or (text.startswith("Expected a path but ") and text.endswith("invalid")):
            continue
        received = _RECEIVED.search(text)
        key_at = max((i for i, kind, _ in frames if kind == "key"), default=-1)
        above = [b for i, b in sorted(bases.items()) if key_at < i < indent]
        leaves.append(
            _Leaf(
                indent=indent,
                path=tuple(
                    part
                    for _, kind, value in frames
                    if kind == "key"
                    for part in value.split(".")
                    if part != "init_args"
                ),
                owner=next((v for _, kind, v in reversed(frames) if kind == "class"), None),
                bases=above[-1] if above else (),
                depth=len(frames),
                text=_RECEIVED.sub("", text).rstrip("."),
                received=_value(received.group(1)) if received else None,
            )
        )
    return leaves


def _set_received(leaves: list[_Leaf], indent: int, value: str) -> None:
    """A union says at its end what it was given: that holds for its own, direct branches."""
    for leaf in reversed(leaves):
        if leaf.indent <= indent:
            return
        if leaf.received is None:
            leaf.received = _value(value)


def _value(text: str) -> str:
    text = text.split(". Got value: ")[0]
    nested = _NESTED_VALUE.match(text)
    return (nested.group(1) if nested else text).strip("'\"")


def _sentence(leaves: list[_Leaf], where: str, options: list[str]) -> str:
    first = leaves[0]
    for leaf in leaves:
        option = _OPTION.search(leaf.text)
        if option and "not accept" in leaf.text:
            if leaf.owner is None:
                return _no_key(".".join(filter(None, option.groups())), options)
            return _no_setting(leaf.owner, option.group(2))
        required = _REQUIRED.search(leaf.text)
        if required:
            names = [f"{where}.{n}" if where else n for n in required.group(1).split(", ")]
            verb = "is" if len(names) == 1 else "are"
            return f"{' and '.join(names)} {verb} not given"
    for leaf in leaves:
        for problem in (_no_class, _no_attribute, _wrong_base):
            text = problem(leaf)
            if text:
                return text
    wanted = [m.group(1) for leaf in leaves if (m := _EXPECTED.match(leaf.text))]
    if len(wanted) == len(leaves):
        return _expected(wanted, next((x.received for x in leaves if x.received), None))
    others = [x for x in leaves if not _EXPECTED.match(x.text)]
    text = _one_line((others or [first])[0].text)
    received = (others or [first])[0].received
    return text if received is None else f"{text}, received {_shown(received)}"


def _expected(wanted: list[str], received: str | None) -> str:
    """``Expected a <class 'int'>`` and its like, of all branches of a union, in plain words."""
    words: list[str] = []
    literals: list[str] = []
    for text in wanted:
        literal = re.match(r"typing\.Literal\[(.*)\]", text)
        plain = re.match(r"<class '(?:[\w.]+\.)?(\w+)'>", text)
        if literal:
            literals += [part.strip().strip("'") for part in literal.group(1).split(",")]
        elif plain:
            words.append(_PLAIN_TYPES.get(plain.group(1), f"a {plain.group(1)}"))
        else:
            words.append(f"a {text}")
    if literals:
        words.insert(0, "one of " + ", ".join(dict.fromkeys(literals)))
    words = list(dict.fromkeys(words))
    words.sort(key=lambda word: word == "null")
    text = "expected " + " or ".join(words)
    if received is None:
        return text
    return f"{text}, received {_shown(received)}{_offer(received, literals)}"


def _shown(value: str) -> str:
    """A value as a user would write it: text in quotes, lists and mappings as they are."""
    return _one_line(value) if value[:1] in ("[", "{", "(") else repr(_one_line(value))


def _unrecognised(words: list[str], options: list[str]) -> str:
    named = [word.split("=")[0] for word in words if word.startswith("-")]
    if not named:
        return f"unexpected argument {words[0]!r}: settings are given as --KEY=VALUE"
    return _no_key(named[0].lstrip("-"), options, dashes="--" if named[0][:2] == "--" else "-")


def _no_key(key: str, options: list[str], dashes: str = "") -> str:
    """A key that no group of settings has: offer the group first, then the whole name."""
    roots = sorted({option.split(".")[0] for option in options})
    root = key.split(".")[0]
    if root not in roots:
        offer = _offer(root, roots, dashes) or f": there are {', '.join(roots)}" * bool(roots)
        return f"unknown setting {dashes}{root}{offer}"
    within = [option for option in options if option.startswith(root + ".")]
    return f"unknown setting {dashes}{key}{_offer(key, within, dashes)}"


def _offer(name: str, choices: Iterable[str], dashes: str = "") -> str:
    close = nearest(name, choices, 2)
    return f": did you mean {' or '.join(dashes + c for c in close)}?" if close else ""


def _no_setting(owner: str, option: str) -> str:
    choices = _settings_of(owner)
    name = option.split(".")[0]
    offer = _offer(name, choices)
    listing = "" if offer or not choices else f" (it has {', '.join(choices)})"
    return f"{owner.rsplit('.', 1)[-1]} has no setting {name!r}{offer}{listing}"


def _no_class(leaf: _Leaf) -> str | None:
    found = _NO_IMPORT.match(leaf.text)
    if not found:
        return None
    name = found.group(1).strip()
    if re.match(r"(timm|open_clip|packaged|exported|local-dir):", name):
        return f"{name!r} is an encoder's name, not a class: give it as encoder={name}"
    bases = [base for base in map(_import, leaf.bases) if inspect.isclass(base)]
    known = sorted({n for base in bases for n in subclass_names(base)})
    offer = _offer(name, known)
    if not offer and known:
        offer = f": there are {', '.join(known)}, or give the import path of your class"
    return f"there is no class {name!r}" + (offer or ": give the import path of a class")


def _no_attribute(leaf: _Leaf) -> str | None:
    found = _NO_ATTRIBUTE.search(leaf.text)
    if found:
        module, name = found.groups()
        try:
            members = vars(importlib.import_module(module))
        except ImportError:
            members = {}
        names = [n for n, v in members.items() if inspect.isclass(v) and not n.startswith("_")]
        close = nearest(name, names, 2)
        offer = f": did you mean {' or '.join(f'{module}.{c}' for c in close)}?" if close else ""
        return f"there is no {module}.{name}{offer}"
    missing = _NO_MODULE.search(leaf.text)
    if missing and leaf.owner:
        return f"{leaf.owner} can't be imported: there is no module {missing.group(1)!r}"
    return None


def _wrong_base(leaf: _Leaf) -> str | None:
    found = _WRONG_BASE.search(leaf.text)
    return f"{found.group(1) or leaf.received} is no {found.group(2)}" if found else None


def _import(path: str) -> object | None:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def subclass_names(base: type) -> list[str]:
    """Names of the concrete classes, of this package or torch.optim, that stand for ``base``."""
    found: list[str] = []
    pending: list[type] = type.__subclasses__(base) if base.__module__ != "builtins" else []
    while pending:
        one = pending.pop()
        pending += type.__subclasses__(one)
        public = not one.__name__.startswith("_") and not inspect.isabstract(one)
        if public and one.__module__.startswith(("multikd", "torch.optim")):
            found.append(one.__name__)
    return found


def _settings_of(class_path: str) -> list[str]:
    """Names of the constructor's parameters; empty when the class can't be imported."""
    target = _import(class_path)
    try:
        parameters = inspect.signature(target.__init__).parameters.values()  # type: ignore[misc]
    except (AttributeError, ValueError, TypeError):
        return []
    return [
        p.name
        for p in parameters
        if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
