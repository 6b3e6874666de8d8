"""What ``multikd fit --help`` says before Lightning's long list: what it is, examples, settings."""

from __future__ import annotations

import argparse
import inspect
import shutil
import textwrap
import typing

import docstring_parser
import yaml
from jsonargparse import DefaultHelpFormatter

from multikd.config_errors import subclass_names

FIT_USAGE = "multikd fit --config NAME_OR_FILE [--KEY=VALUE ...]"
EVALUATE_USAGE = "multikd {command} --ckpt_path=FILE [--config NAME_OR_FILE] [--KEY=VALUE ...]"

FIT_INTRODUCTION = """\
Train a student from a config: a YAML file, or the name of a shipped one (`multikd configs` lists
them, `multikd configs base` is a template with every setting explained). Each setting of the file
can be given as --KEY=VALUE too; what comes later wins.

examples:
  multikd fit --config laptop --data.train=my-shards/
  multikd fit --config laptop --data.train=my-shards/ --trainer.max_epochs=30 \\
      --model.teachers.dino=teachers/dino_vits16.yaml --model.dropper=HardestKept
  multikd fit --config laptop --data.train=my-shards/ --ckpt_path=last     go on after a stop
"""

EVALUATE_INTRODUCTION = """\
{text}. The config comes out of the checkpoint unless one is given.

example:
  multikd {command} --ckpt_path=runs/laptop/last.ckpt --data.val=val-shards/{more}
"""

_BANK = " --data.bank=train-shards/"
EVALUATE = {
    "validate": ("Losses and k-NN accuracy of a checkpoint on labelled shards", _BANK),
    "test": ("Losses and k-NN accuracy of a checkpoint on labelled shards", _BANK),
    "predict": (
        "Features of a set of shards, written by a callback",
        " \\\n      --trainer.callbacks+=FeatureWriter --trainer.callbacks.out=features/",
    ),
}

_MOST_CLASSES = 8

CLOSING = """\
A class in place of any of these is given by name or import path, its settings behind it:
  --model.dropper=multikd.losses.RandomTeachers --model.dropper.p=0.3
One of yours that a config names needs --allow_code=ITS_PACKAGE: naming a module runs its code.
`python -m pydoc multikd.losses.RandomTeachers` explains a class. What follows are the options of
the command and of Lightning's Trainer.
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's formatter, with the description's lines as they were written."""


def describe(introduction: str, classes: dict[str, type]) -> str:
    """An introduction, and one entry for each setting of the classes (section → class)."""
    width = min(100, shutil.get_terminal_size((100, 20)).columns)
    parts = [introduction]
    for section, target in classes.items():
        parts.append(f"--{section}.KEY ({target.__module__}.{target.__name__}):")
        parts += [_entry(*row, width=width) for row in _settings(target)]
        parts.append("")
    return "\n".join([*parts, CLOSING])


def _settings(target: type) -> list[tuple[str, str, str]]:
    """(name, default, explanation) of every parameter of a constructor."""
    documented = docstring_parser.parse(inspect.getdoc(target) or "")
    words = {p.arg_name: " ".join((p.description or "").split()) for p in documented.params}
    hints = typing.get_type_hints(target.__init__)  # type: ignore[misc]
    rows = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            default = "must be given"
        else:
            default = yaml.safe_dump(parameter.default).splitlines()[0]
        text = words.get(parameter.name, "").replace("``", "").replace("None:", "null:")
        names = sorted({n for c in _classes(hints[parameter.name]) for n in subclass_names(c)})
        if 0 < len(names) <= _MOST_CLASSES:
            text = f"{text} ({', '.join(names)})"
        rows.append((parameter.name, default, text))
    return rows


def _classes(hint: object) -> list[type]:
    """The classes in a type hint, however deep."""
    inner = [c for part in typing.get_args(hint) for c in _classes(part)]
    return [hint, *inner] if inspect.isclass(hint) else inner


def _entry(name: str, default: str, text: str, width: int) -> str:
    lines = textwrap.wrap(f"{text} [{default}]", width - 24)
    head = f"  {name:<21} "
    if len(head) > 24:
        lines.insert(0, "")
    return "\n".join((head if i == 0 else " " * 24) + line for i, line in enumerate(lines)).rstrip()


def help_texts(classes: dict[str, type]) -> dict[str, dict[str, str]]:
    """Usage and description of each command's parser."""
    texts = {
        "fit": {"usage": FIT_USAGE, "description": describe(FIT_INTRODUCTION, classes)},
    }
    for command, (text, more) in EVALUATE.items():
        introduction = EVALUATE_INTRODUCTION.format(command=command, text=text, more=more)
        texts[command] = {
            "usage": EVALUATE_USAGE.format(command=command),
            "description": describe(introduction, classes),
        }
    return texts
