"""Config files and fragments, resolved before the Lightning CLI sees them.

``--config laptop`` finds a shipped config. A *fragment* is a file with one teacher or student
(``class_path`` and ``init_args``); it is named where the object would stand, in a config
(``dino: teachers/dino_vitb16.yaml``) or on the command line
(``--model.teachers.dino=teachers/dino_vitb16.yaml``), looked for beside the config (in the working
directory), then among the shipped ones.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from multikd.shipped import find_config, find_fragment
from multikd.untrusted import read_bytes

_MOST_NESTED = 8
_SECTIONS = ("trainer", "model", "data")
_MOST_BYTES = 1 << 20  # of a config file; a data set of many shards is a folder or a brace range
_MOST_BRACKETS = 100
_MOST_CHARACTERS = 1 << 24  # of a config once its aliases are written out


class _Loader(yaml.SafeLoader):
    """YAML as jsonargparse reads it: ``1e-4`` is a number, dates stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if not tag.endswith((":timestamp", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: not readable as text, larger than a megabyte, or not YAML (line and column are
            named).
    """
    try:
        text = read_bytes(path, _MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: give a YAML config") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, what: object) -> Any:
    """The values of YAML text; ``what`` it is of, for the message. Only plain values are made.

    Raises:
        ValueError: it is not YAML, nests too deeply, or its aliases write out to millions of
            characters (nine lines are enough for gigabytes) or lead back to themselves.
    """
    try:
        _refuse_deep(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _written_out(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        if mark and "'\\t'" in problem:
            problem = "a tab stands where only spaces may"
        raise ValueError(f"{what} is no valid YAML: {problem}{where}") from error
    except RecursionError as error:
        raise ValueError(f"{what} is no valid YAML: it nests too deeply") from error
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # What PyYAML's constructors raise for a value that is not what its tag says.
        problem = " ".join(str(error).split())[:160]
        raise ValueError(f"{what} is no valid YAML: {problem}") from error


def _refuse_deep(text: str) -> None:
    """PyYAML takes time with the square of how deep brackets nest."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > _MOST_BRACKETS:
            raise RecursionError


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters of a node with every alias in it written out.

    Raises:
        ValueError: too many, or an alias within what it stands for.
    """
    size = known.get(id(node))
    if size == 0:
        raise ValueError("an alias stands for something that holds the alias itself")
    if size is not None:
        return size
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.ScalarNode):
        total += len(node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_written_out(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_written_out(k, known) + _written_out(v, known) for k, v in node.value)
    if total > _MOST_CHARACTERS:
        raise ValueError(f"its aliases write out to more than {_MOST_CHARACTERS} characters")
    known[id(node)] = total
    return total


def inline_fragments(value: Any, folder: Path, key: str = "", depth: int = 0) -> Any:
    """A config with the content of every fragment in place of its name.

    A file is a fragment when it holds objects (``class_path``) or stands for a whole ``trainer``,
    ``model`` or ``data`` section, or for all ``teachers``; the names of other YAML files are left
    as they are.

    Raises:
        ValueError: a fragment that is not found, or fragments that name one another in a circle.
    """
    if depth > _MOST_NESTED:
        raise ValueError(f"fragments in {folder} name one another more than {_MOST_NESTED} deep")
    if isinstance(value, dict):
        return {k: inline_fragments(item, folder, str(k), depth) for k, item in value.items()}
    if isinstance(value, list):
        return [inline_fragments(item, folder, "", depth) for item in value]
    path = find_fragment(value, folder) if isinstance(value, str) else None
    if path is None:
        return value
    content = read_yaml(path)
    if not _is_objects(content) and key not in (*_SECTIONS, "teachers"):
        return str(path) if (folder / value).is_file() else value
    return inline_fragments(content, path.parent, key, depth + 1)


def _is_objects(content: Any) -> bool:
    if isinstance(content, list):
        return bool(content) and all(_is_objects(item) for item in content)
    return isinstance(content, dict) and ("class_path" in content or "init_args" in content)


def load_config(name: str) -> dict[str, Any]:
    """A config by path or shipped name, complete: without references to other files.

    Raises:
        ValueError: it is not found, or not readable.
    """
    path = find_config(name)
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        what = "is empty" if not content else f"holds a {type(content).__name__}"
        raise ValueError(f"{path} {what}: expected sections such as trainer, model and data")
    loaded: dict[str, Any] = inline_fragments(content, path.parent)
    return loaded


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Command-line arguments with configs and fragments in place of their names.

    ``--config NAME``, ``--config=NAME`` and ``-c NAME`` become the content of the config as JSON,
    and so does a fragment behind any ``--model.…`` or ``--data.…``.

    Raises:
        ValueError: a config or fragment that is not found or not readable.
    """
    resolved: list[str] = []
    pending = list(args)
    while pending:
        argument = pending.pop(0)
        option, equals, value = argument.partition("=")
        # `--key value` means the same as `--key=value`.
        if not equals and pending and option.startswith("-") and not pending[0].startswith("-"):
            value = pending[0]
            separate = True
        else:
            separate = False
        if option == "--config" and equals and value.startswith("{"):
            resolved.append(argument)  # a whole config of ours, not the name of one
        elif option in ("--config", "-c") and (value or equals):
            resolved.append(f"--config={json.dumps(load_config(value), default=str)}")
        elif isinstance(content := _fragment(option, value), dict | list):
            resolved.append(f"{option}={json.dumps(content, default=str)}")
        else:
            resolved.append(argument)
            continue
        if separate:
            pending.pop(0)
    return resolved


def modules_typed(args: Sequence[str]) -> frozenset[str]:
    """Packages of the import paths that a user typed as values; what is in files is not typed."""
    found: set[str] = set()
    for argument, value in _typed(args):
        if argument in ("--config", "-c", "--ckpt_path") or value.endswith((".yaml", ".yml")):
            continue
        if value[:1] in ("[", "{", "("):
            found |= set(re.findall(r"(\w+)(?:\.\w+)+", value))
        elif re.fullmatch(r"\w+([.:]\w+)+", value):
            found.add(re.split("[.:]", value)[0])
    return frozenset(name for name in found if name.isidentifier()) - sys.stdlib_module_names


def _typed(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value) of ``--option=value`` and ``--option value``."""
    option = ""
    for argument in args:
        if argument.startswith("-"):
            option, equals, value = argument.partition("=")
            if equals:
                yield option, value
        else:
            yield option, argument


def refuse_shell(config: Any, args: Sequence[str]) -> None:
    """Refuse ``allow_pipe`` unless the command line itself sets it: a file must not start a shell.

    Args:
        config: the parsed config, in mappings and lists.
        args: what the user typed (or had typed).

    Raises:
        ValueError: a config, a fragment or a checkpoint allows ``pipe:`` commands.
    """
    for place, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        if option in ("--data.allow_pipe", "--data.init_args.allow_pipe"):
            value = value if equals else " ".join(args[place + 1 : place + 2])
            if value.lower() in ("true", "1", "yes", "on"):
                return
    if _allows_pipe(config):
        raise ValueError(
            "the config sets allow_pipe, with which it would run shell commands of whoever wrote "
            "it: read its pipe: sources, and if you trust them add --data.allow_pipe=true to the "
            "command"
        )


def _allows_pipe(config: Any) -> bool:
    if isinstance(config, Mapping):
        return any(
            (str(key) == "allow_pipe" and bool(value)) or _allows_pipe(value)
            for key, value in config.items()
        )
    return isinstance(config, list | tuple) and any(_allows_pipe(item) for item in config)


def _fragment(option: str, value: str) -> Any:
    """The content of the fragment that an option names; anything else is None."""
    section, *_ = option.lstrip("-").partition(".")
    if section not in _SECTIONS or not option.startswith("--"):
        return None
    path = find_fragment(value)
    if path is None:
        return None
    key = option.lstrip("-").rpartition(".")[2]
    return inline_fragments(str(path.resolve()), path.parent, key)
