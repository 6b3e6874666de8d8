"""``multikd fit | validate | test | predict``: the Lightning CLI over typed configs.

The demo, the ablation and the commands all train through :func:`run_lightning`; there is no other
training loop.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)

import multikd
from multikd.checkpoints import CHECKPOINT_KEY
from multikd.config_errors import condense
from multikd.data.module import ShardDataModule
from multikd.modules.distillation import DistillationModule
from multikd.shipped import find_config

log = logging.getLogger(__name__)


class ConfigInCheckpoint(SaveConfigCallback):
    """Write the full typed config beside the logs and into every checkpoint.

    Later commands (evaluate, export, resume) then need the checkpoint alone.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the config as YAML text: plain strings load with ``weights_only=True``."""
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
        checkpoint[CHECKPOINT_KEY] = {"version": multikd.__version__, "config": text}


class ConfigParser(LightningArgumentParser):
    """A parser whose complaint about a config is one sentence, raised as a ValueError."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, with the nearest right name."""
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [o for a in parser._actions for o in a.option_strings if o.startswith("--")]
        raise ValueError(
            f"config: {condense(message, options)}. `{parser.prog.split(' [')[0]} --help` "
            "lists every setting"
        ) from None


class MultikdCLI(LightningCLI):
    """The Lightning CLI with our defaults; ``--config`` also takes the name of a shipped config."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose config files carry our version."""
        kwargs.setdefault("dump_header", [f"multikd=={multikd.__version__}"])
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The model and the data module have a default class, so that only their settings need be
        written."""
        parser.set_defaults(
            {
                "model": {"class_path": f"{DistillationModule.__module__}.DistillationModule"},
                "data": {"class_path": f"{ShardDataModule.__module__}.ShardDataModule"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without Lightning's warning about ``sys.argv``, which our dispatcher reads."""
        self.config = (
            parser.parse_args(args if isinstance(args, list) else sys.argv[1:])
            if not isinstance(args, dict)
            else parser.parse_object(args)
        )


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replace names of shipped configs behind ``--config``/``-c`` by their paths."""
    resolved: list[str] = []
    expects = False
    for argument in args:
        if expects:
            resolved.append(str(find_config(argument)))
            expects = False
        elif argument in ("--config", "-c"):
            resolved.append(argument)
            expects = True
        elif argument.startswith("--config="):
            resolved.append(f"--config={find_config(argument.removeprefix('--config='))}")
        else:
            resolved.append(argument)
    return resolved


def build_cli(args: Sequence[str], *, run: bool) -> MultikdCLI:
    """Parse ``args`` and build trainer, model and data; with ``run`` also do what they say.

    With ``run`` the first argument is ``fit``, ``validate``, ``test`` or ``predict``.
    """
    return MultikdCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=ConfigInCheckpoint,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            # The loader slices the global order by rank itself (multikd.data.order).
            "use_distributed_sampler": False,
        },
        parser_class=ConfigParser,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"parser_mode": "yaml"},
        args=resolve_configs(args),
        run=run,
    )


def run_lightning(args: Sequence[str]) -> MultikdCLI:
    """Run ``fit | validate | test | predict`` with command-line arguments, in this process."""
    return build_cli(args, run=True)


__all__ = [
    "ArgumentError",
    "ConfigInCheckpoint",
    "MultikdCLI",
    "build_cli",
    "resolve_configs",
    "run_lightning",
]
