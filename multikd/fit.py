"""``multikd fit | validate | test | predict``: the Lightning CLI over typed configs.

The demo, the ablation and the commands all train through :func:`run_lightning`; there is no other
training loop.
"""

from __future__ import annotations

import functools
import json
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import multikd
import multikd.callbacks  # so that a config can name them without their import path
from multikd import preflight
from multikd.callbacks.precompute import PrecomputeFeatures
from multikd.callbacks.preemption import SaveOnSignal, hpc_checkpoints
from multikd.callbacks.tuning import TunedProcess
from multikd.checkpoints import CHECKPOINT_KEY, read_checkpoint, read_config
from multikd.config_files import modules_typed, refuse_shell, resolve_configs
from multikd.config_parser import ConfigParser, Unbuildable, construct
from multikd.data.cache_record import read_meta
from multikd.data.module import ShardDataModule
from multikd.fit_faults import explained
from multikd.fit_help import HelpFormatter, help_texts
from multikd.fit_summary import checkpoint_of
from multikd.imports import allowing, only_allowed
from multikd.modules.distillation import DistillationModule
from multikd.redaction import redact, redact_values
from multikd.saving import VerifiedCheckpointIO, newest_whole
from multikd.teachers import Teacher
from multikd.teachers.deferred import defer_teacher
from multikd.teachers.kept import make_teacher

log = logging.getLogger(__name__)

# Where a run writes that was not told where to.
DEFAULT_FOLDER = "runs/unnamed"
# Keys of a run's config that belong to the command, not to the run.
_OF_THE_COMMAND = ("ckpt_path", "weights_only", "verbose", "return_predictions")


class ConfigInCheckpoint(SaveConfigCallback):
    """Write the full typed config beside the logs and into every checkpoint.

    Later commands (evaluate, export, resume) then need the checkpoint alone.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the config as YAML text: plain strings load with ``weights_only=True``."""
        text = self.parser.dump(self.config, skip_unset=False, skip_link_targets=False)
        checkpoint[CHECKPOINT_KEY] = {"version": multikd.__version__, "config": text}

    def __init__(self, parser: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # What is written down, beside the logs and into checkpoints, has no secrets of addresses.
        super().__init__(parser, _without_secrets(config), *args, **kwargs)


def _without_secrets(value: Any) -> Any:
    """A parsed config, or a part of it, with every text redacted; a copy."""
    if isinstance(value, Namespace):
        return Namespace(  # type: ignore[no-untyped-call]
            **{key: _without_secrets(item) for key, item in vars(value).items()}
        )
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_secrets(item) for item in value)
    return redact(value) if isinstance(value, str) else value


class MultikdCLI(LightningCLI):
    """The Lightning CLI with our defaults; ``--config`` also takes the name of a shipped config.

    Args:
        args, kwargs: Lightning's.
        resume_auto: ``fit`` goes on from the newest whole checkpoint of the run's folder.
        allow_changes: go on although settings differ that change what is trained.
        process: sets allocator and float32 products when training begins.
    """

    def __init__(
        self,
        *args: Any,
        resume_auto: bool = False,
        allow_changes: bool = False,
        process: TunedProcess | None = None,
        **kwargs: Any,
    ) -> None:
        self.process = process
        self.resume_auto = resume_auto
        self.allow_changes = allow_changes
        super().__init__(*args, **kwargs)

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
        with only_allowed():
            self.config = (
                parser.parse_args(args if isinstance(args, list) else sys.argv[1:])
                if not isinstance(args, dict)
                else parser.parse_object(args)
            )
        if isinstance(args, list):
            refuse_shell(self.config.as_dict(), args)
        for command in ("fit", "validate", "test", "predict"):
            if command in self.config:
                # A config that asks for unpickling would run what is in its checkpoint.
                self.config[command]["weights_only"] = True

    def _parse_ckpt_path(self) -> None:
        """Read the checkpoint before anything is built; the config it carries is not merged."""
        path = self._checkpoint_path()
        # A folder is a distributed checkpoint, which Lightning and torch check shard by shard.
        whole = path is not None and not path.is_dir()
        self._checkpoint = read_checkpoint(path) if path is not None and whole else None

    def _checkpoint_path(self) -> Path | None:
        """The file of ``--ckpt_path``; None where Lightning is to find one, or none is given."""
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        return None if path is None or path in preflight.CKPT_WORDS else Path(path)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a constructor's error arrives as it was raised."""
        # Teachers whose features are all kept need not be loaded, and of a partition only a part.
        model = getattr(self._get(self.config, "model"), "init_args", None)
        parted = getattr(model, "partition", None) is not None
        known = functools.partial(make_teacher, self._known())
        made = functools.partial(defer_teacher) if parted else known
        made.__name__ = Teacher.__name__  # type: ignore[attr-defined]

        def teacher(class_type: type[Teacher], *args: Any, **kwargs: Any) -> Any:
            return construct(made if class_type is Teacher else class_type, *args, **kwargs)

        with only_allowed():
            self.config_init = self.parser.instantiate(
                self.config, instantiators=[(teacher, Teacher, False), (construct, object, True)]
            )
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()

    def _known(self) -> dict[str, dict[str, Any]]:
        """Identity → facts of the teachers in the feature cache that the config names."""
        data = self._get(self.config, "data")
        folder = getattr(getattr(data, "init_args", None), "cache", None)
        if not isinstance(folder, str):
            return {}
        try:
            records = read_meta(Path(folder), None)
        except (OSError, ValueError):  # said where the cache is opened
            return {}
        return {
            str(r.about["identity"]): r.about for r in records.values() if "identity" in r.about
        }

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with logs and checkpoints in the run's folder unless told otherwise."""
        settings = self._get(self.config_init, "trainer", default={})
        folder = str(settings.get("default_root_dir") or DEFAULT_FOLDER)
        if settings.get("logger") in (None, True) and not settings.get("barebones"):
            kwargs["logger"] = default_loggers(folder)
        plugins = settings.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        strategy = settings.get("strategy")
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins) and (
            getattr(strategy, "_checkpoint_io", None) is None
        ):
            kwargs["plugins"] = [*plugins, VerifiedCheckpointIO()]
        callbacks = settings.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        added: list[pl.Callback] = [] if self.process is None else [self.process]
        if not any(isinstance(callback, SaveOnSignal) for callback in callbacks):
            added.append(SaveOnSignal())
        cached = isinstance(self.datamodule, ShardDataModule) and self.datamodule.cache is not None
        if cached and not any(isinstance(callback, PrecomputeFeatures) for callback in callbacks):
            # What data.cache means: computed where it is missing, read where it is there.
            added.append(PrecomputeFeatures())
        if added:
            kwargs["callbacks"] = [*callbacks, *added]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ValueError(f"trainer: {' '.join(str(error).split())}") from error
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = folder if "://" in folder else str(Path(folder).resolve())
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Check what can be checked, run, and say how to go on after an interruption."""
        self._check(subcommand)
        handler = signal.getsignal(signal.SIGINT)
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            if handler is not None:
                signal.signal(signal.SIGINT, handler)  # which Lightning set to ignore
            raise KeyboardInterrupt(self._how_to_go_on()) from None
        except (RuntimeError, MemoryError) as error:
            reason = explained(error, self.trainer, self.model, self.datamodule)
            if reason is None:
                raise
            raise reason from error

    def _check(self, subcommand: str) -> None:
        """Everything that can be known to fail before Lightning begins.

        Raises:
            ValueError: the first mistake, in one sentence.
        """
        trainer, data, model = self.trainer, self.datamodule, self.model
        given = self._get(self.config, "ckpt_path")
        if subcommand == "fit" and given is None and self._is_to_go_on():
            given = self._go_on()
        if given is None and subcommand != "fit":
            raise ValueError(
                f"{subcommand} needs a trained checkpoint: give --ckpt_path=FILE "
                "(its config need not be given again)"
            )
        self._check_checkpoint(given, resuming=subcommand == "fit")
        if isinstance(data, ShardDataModule):
            if subcommand != "fit" and not data.has("val"):
                raise ValueError(f"{subcommand} needs shards to run on: give --data.val=SHARDS")
            if subcommand == "fit":
                preflight.check_monitors(trainer, data)
                preflight.check_partition(trainer, model)
            if isinstance(model, DistillationModule):
                preflight.check_images(model, data)
        if subcommand == "fit" and given is None and not self.resume_auto:
            preflight.check_earlier_run(trainer)
        preflight.check_output(trainer.default_root_dir)

    def _is_to_go_on(self) -> bool:
        """Whether the newest whole checkpoint is asked for: by name, or by a requeued SLURM job.

        Lightning would take the newest checkpoint of a *signal* there, also where a later one of
        the run exists, and would not look whether it is whole.
        """
        root = self.trainer.default_root_dir
        return self.resume_auto or (SLURMEnvironment.detect() and bool(hpc_checkpoints(root)))

    def _go_on(self) -> str | None:
        """Find the newest whole checkpoint, say which, and let ``fit`` begin there."""
        folders = preflight.checkpoint_folders(self.trainer)
        paths = [path for folder in folders for path in folder.glob("*.ckpt")]
        paths += hpc_checkpoints(self.trainer.default_root_dir)
        found = newest_whole(dict.fromkeys(paths), log.warning)
        if found is None:
            if paths:
                raise ValueError(
                    f"none of the {len(paths)} checkpoints of this run is whole, and a new run "
                    "would write over them: move them away, or give another "
                    "--trainer.default_root_dir"
                )
            where = ", ".join(map(preflight.shown, folders)) or self.trainer.default_root_dir
            log.info("no checkpoint to go on from in %s: a new run begins", where)
            return None
        log.info("going on from %s (step %d)", preflight.shown(found.path), found.step)
        self.config_init["fit"]["ckpt_path"] = self.config["fit"]["ckpt_path"] = str(found.path)
        self._checkpoint = None if found.path.is_dir() else read_checkpoint(found.path)
        return str(found.path)

    def _check_checkpoint(self, given: str | None, resuming: bool) -> None:
        path, checkpoint = self._checkpoint_path(), self._checkpoint
        if given == "last" and (newest := checkpoint_of(self.trainer)) is not None:
            path = Path(newest)
            checkpoint = None if path.is_dir() else read_checkpoint(path)
            # Of several, Lightning would take the newest by the clock.
            command = self.config["subcommand"]
            self.config_init[command]["ckpt_path"] = self.config[command]["ckpt_path"] = newest
        self._checkpoint = None
        if path is not None and checkpoint is not None:
            self._dump_config()
            allow = self.allow_changes
            preflight.check_checkpoint(
                path, checkpoint, self.model, redact_values(self.config_dump), resuming, allow
            )
            if resuming and isinstance(self.datamodule, ShardDataModule):
                self.datamodule.allow_other_order = allow
                preflight.check_place(checkpoint, self.datamodule)

    def _how_to_go_on(self) -> str:
        newest = checkpoint_of(self.trainer)
        if newest is None:
            return "interrupted before the first checkpoint was written"
        return (
            f"interrupted; the same command with --ckpt_path=last goes on from {newest}, with "
            "--resume auto from the newest that is whole"
        )


# Settings of the process that `fit` makes, and their choices.
_CHOICES = {
    "--allocator": ("keep", "default"),
    "--float32_products": ("highest", "high", "medium"),
}


@dataclass
class OwnArguments:
    """Arguments of ``fit`` that Lightning's parser does not know, taken out of the others.

    Attributes:
        rest: the others.
        resume_auto: ``--resume auto``.
        allow_changes: ``--allow_changes``.
        allocator: ``--allocator keep|default``.
        float32_products: ``--float32_products highest|high|medium``.
    """

    rest: list[str]
    resume_auto: bool = False
    allow_changes: bool = False
    allocator: str = "keep"
    float32_products: str | None = None

    @classmethod
    def taken_from(cls, args: Sequence[str]) -> OwnArguments:
        """Separate them.

        Raises:
            ValueError: ``--resume`` of something else, of another command, or with a
                ``--ckpt_path``.
        """
        own = cls([])
        pending = list(args)
        while pending:
            argument = pending.pop(0)
            name, equals, value = argument.partition("=")
            if name == "--resume":
                value = value if equals else (pending.pop(0) if pending else "")
                if value != "auto":
                    raise ValueError(
                        f"--resume takes 'auto', received {value!r}: a checkpoint of your choice "
                        "is --ckpt_path=FILE"
                    )
                own.resume_auto = True
            elif argument in ("--allow_changes", "--allow-changes"):
                own.allow_changes = True
            elif name in _CHOICES:
                value = value if equals else (pending.pop(0) if pending else "")
                if value not in _CHOICES[name]:
                    raise ValueError(
                        f"{name} must be one of {', '.join(_CHOICES[name])}, received {value!r}"
                    )
                setattr(own, name.removeprefix("--"), value)
            else:
                own.rest.append(argument)
        if (own.resume_auto or own.allow_changes) and own.rest[:1] != ["fit"]:
            raise ValueError("--resume and --allow_changes belong to `multikd fit`")
        if own.resume_auto and any(a.partition("=")[0] == "--ckpt_path" for a in own.rest):
            raise ValueError("--resume auto finds a checkpoint by itself: leave --ckpt_path out")
        return own


def default_loggers(folder: str) -> list[Logger]:
    """CSV and TensorBoard logs in the run's folder, in a new ``version_N`` with each command."""
    return [
        CSVLogger(folder, name="csv"),
        TensorBoardLogger(folder, name="tensorboard", default_hp_metric=False),
    ]


def with_kept_config(args: Sequence[str]) -> list[str]:
    """Arguments without a ``--config`` get the config that their ``--ckpt_path`` carries.

    Raises:
        ValueError: the checkpoint is missing, truncated or not ours.
    """
    given = [a.partition("=")[0] for a in args]
    if "--config" in given or "-c" in given or "--ckpt_path" not in given:
        return list(args)
    at = given.index("--ckpt_path")
    equals, value = args[at].partition("=")[1:]
    value = value if equals else (args[at + 1] if at + 1 < len(args) else "")
    if not value or value in preflight.CKPT_WORDS:
        return list(args)
    kept = read_config(read_checkpoint(value), value)
    for key in _OF_THE_COMMAND:
        kept.pop(key, None)
    return [args[0], f"--config={json.dumps(kept, default=str)}", *args[1:]]


def build_cli(
    args: Sequence[str],
    *,
    run: bool,
    kind: type[MultikdCLI] = MultikdCLI,
    typed: bool = True,
) -> MultikdCLI:
    """Parse ``args`` and build trainer, model and data; with ``run`` also do what they say.

    With ``run`` the first argument is ``fit``, ``validate``, ``test`` or ``predict``. ``typed``:
    whether the user typed the arguments, and so allows the code that they name; what was read from
    a file allows none.

    Raises:
        ValueError: a mistake in config, arguments, checkpoint or data, in one sentence.
    """
    own = OwnArguments.taken_from(args) if run else OwnArguments(list(args))
    arguments = resolve_configs(own.rest)
    try:
        with allowing(modules_typed(own.rest) if typed else ()):
            return _cli(with_kept_config(arguments) if run else arguments, run, own, kind)
    except Unbuildable as stop:
        raise stop.reason from stop.reason.__cause__
    except MisconfigurationException as error:
        raise ValueError(" ".join(str(error).split())) from error


def _cli(arguments: list[str], run: bool, own: OwnArguments, kind: type[MultikdCLI]) -> MultikdCLI:
    classes: dict[str, type] = {"model": DistillationModule, "data": ShardDataModule}
    return kind(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=ConfigInCheckpoint,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            # The loader slices the global order by rank itself (multikd.data.order).
            "use_distributed_sampler": False,
            "default_root_dir": DEFAULT_FOLDER,
        },
        parser_class=ConfigParser,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={
            "parser_mode": "yaml",
            "formatter_class": HelpFormatter,
            **help_texts(classes),
        },
        args=arguments,
        run=run,
        resume_auto=own.resume_auto,
        allow_changes=own.allow_changes,
        process=TunedProcess(own.allocator, own.float32_products) if run else None,
    )


class _ParsedOnly(MultikdCLI):
    """Parses and checks the types of a config; builds nothing."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def parse_config(config: dict[str, Any]) -> None:
    """Check a whole config as far as that goes without building anything.

    Raises:
        ValueError: an unknown setting or class, or a value of the wrong type, in one sentence.
    """
    with without_known_noise():
        arguments = [f"--config={json.dumps(config, default=str)}"]
        build_cli(arguments, run=False, kind=_ParsedOnly, typed=False)


@contextmanager
def without_known_noise() -> Iterator[None]:
    """Silence the warnings that say nothing to a user of ours; every other one is shown."""
    with warnings.catch_warnings():
        # Lightning calls jsonargparse by parameter names that are being replaced.
        warnings.filterwarnings(
            "ignore", r"\s*(skip_none|By default only one Jsonargparse)", DeprecationWarning
        )
        # It asks torch's pytree in a way that torch deprecates.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        # Teachers and the student's average, which are never in train mode.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode", UserWarning)
        # Logs share the folder; earlier checkpoints there are refused before (preflight).
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        # The summary's megabytes, which are those of 32 bits under any mixed precision.
        warnings.filterwarnings("ignore", r"Precision \S+ is not supported by the model summary")
        # A run that goes on in another folder: it keeps its own best from there on.
        warnings.filterwarnings("ignore", "The dirpath has changed from", UserWarning)
        # A data module that was given no validation shards.
        warnings.filterwarnings(
            "ignore", "Total length of `list` across ranks is zero", UserWarning
        )
        yield


def run_lightning(args: Sequence[str]) -> MultikdCLI:
    """Run ``fit | validate | test | predict`` with command-line arguments, in this process."""
    with without_known_noise():
        return build_cli(args, run=True)


__all__ = [
    "ConfigInCheckpoint",
    "MultikdCLI",
    "build_cli",
    "resolve_configs",
    "run_lightning",
    "without_known_noise",
]
