"""The parser of typed configs, and how objects are built from them: errors in one sentence."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from multikd.config_errors import condense

# Their messages name what they are about; those of other classes get the class's name before them.
_NAME_THEMSELVES = ("DistillationModule", "ShardDataModule", "Teacher", "StudentEncoder")


class ConfigError(ValueError):
    """What is wrong with a config, in one sentence."""


class Unbuildable(BaseException):
    """Carries a constructor's exception out of jsonargparse.

    jsonargparse takes any ``Exception`` of a constructor for "this branch of the union does not
    fit", tries the others, and reports them all. This one it lets pass.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def construct(class_type: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a constructor for jsonargparse; what it raises is raised as it is."""
    try:
        for setting, value in kwargs.items():
            _refuse_standard(setting, value)
        _refuse_null(class_type, kwargs)
        return class_type(*args, **kwargs)
    except Exception as error:
        name = getattr(class_type, "__name__", str(class_type))
        plain = isinstance(error, ValueError | TypeError | ImportError)
        if not plain or (name in _NAME_THEMSELVES and not isinstance(error, TypeError)):
            raise Unbuildable(error) from error
        sentence = ConfigError(f"{name}: {' '.join(str(error).split())}")
        raise Unbuildable(sentence) from error


def _short(sentence: str, most: int = 1000) -> str:
    """A sentence without the middle of what would fill pages (a value from a hostile config)."""
    if len(sentence) <= most:
        return sentence
    return f"{sentence[: most * 2 // 3]} … {sentence[-most // 3 :]}"


def _refuse_standard(setting: str, value: Any) -> None:
    """Refuse a function of Python's own library as a setting: ``os.abort`` is nobody's hook.

    Settings that take any callable are where a config from elsewhere could name one. Functions of
    users and of torch or Lightning are what such settings are for.

    Raises:
        ValueError: names the setting and the function.
    """
    while isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return
    root = str(getattr(value, "__module__", "")).partition(".")[0]
    plain = isinstance(value, type) and root == "builtins"
    if root in sys.stdlib_module_names and not plain:
        raise ValueError(
            f"{setting} names {value.__module__}.{value.__qualname__} of Python's standard "
            "library, which no config may have called: give a function or class of your own"
        )


def _refuse_null(class_type: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Refuse null where a number or text belongs, which jsonargparse lets pass.

    Raises:
        ValueError: names the setting.
    """
    if None not in settings.values():
        return
    try:
        made = class_type.__init__ if isinstance(class_type, type) else class_type  # type: ignore[misc]
        hints = typing.get_type_hints(made)
    except (NameError, TypeError, AttributeError):  # a name that only a type checker knows
        return
    for setting, value in settings.items():
        if value is None and (kind := _plain(hints.get(setting))):
            raise ValueError(f"{setting} is null, expected a value of type {kind}: leave it out")


def _plain(hint: Any) -> str:
    """``int``, ``int or 'auto'``: a hint of plain values alone, in words; else nothing."""
    if hint in (int, float, bool, str):
        return str(hint.__name__)
    if typing.get_origin(hint) is Literal:
        values = typing.get_args(hint)
        return "" if None in values else " or ".join(map(repr, values))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_plain(part) for part in typing.get_args(hint)]
        return " or ".join(parts) if all(parts) else ""
    return ""


class ConfigParser(LightningArgumentParser):
    """A parser whose complaint about a config is one sentence, raised as a ValueError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What an abbreviation stands for changes with every setting that is added.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Without jsonargparse's reading of values as files.

        A path of a shard would be read whole at each validation, to see whether it is YAML, and an
        address of one be downloaded. Fragments are resolved before (``config_files``).
        """
        added: list[str] = super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})
        return added

    def add_function_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """As for classes."""
        added: list[str] = super().add_function_arguments(*args, **{**kwargs, "sub_configs": False})
        return added

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any
    ) -> Any:
        """Parse; the parser of a class inside the config gets its values as jsonargparse's ``str``.

        A nested ``--model.student.checkpoint=null`` would otherwise arrive as the text "None".
        """
        if args is not None and not self.exit_on_error:
            args = [_as_yaml(argument) for argument in args]
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, with the nearest right name."""
        if not self.exit_on_error:
            # The parser of a class inside the config: the outermost one will speak.
            super().error(message, ex)
        said = _already_said(ex)
        if said is not None:
            raise said from None
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [o for a in parser._actions for o in a.option_strings if o.startswith("--")]
        sentence = condense(message, options)
        command = getattr(parser, "subcommand", "fit")
        if sentence.endswith("not given") and "model." in sentence:
            sentence += f": start from a config, `multikd {command} --config laptop`"
        elif re.search("unknown setting|has no setting|not given", sentence) and (
            "did you mean" not in sentence
        ):
            sentence += f" (`multikd {command} --help` lists every setting)"
        raise ConfigError(_short(sentence)) from None


def _as_yaml(argument: str) -> str:
    """``--key=VALUE`` with Python's way of writing None, lists and mappings turned into YAML's."""
    option, equals, value = argument.partition("=")
    if value == "None":
        return f"{option}=null"
    if equals and value[:1] in ("[", "{", "("):
        try:
            return f"{option}={json.dumps(ast.literal_eval(value), allow_nan=False)}"
        except (ValueError, SyntaxError, TypeError):
            return argument
    return argument


def _already_said(error: BaseException | None) -> ConfigError | None:
    """The sentence that a parser within this one has already made of it."""
    while error is not None:
        if isinstance(error, ConfigError):
            return error
        error = error.__cause__ or error.__context__
    return None
