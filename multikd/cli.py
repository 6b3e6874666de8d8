"""The ``multikd`` command. Commands only: each imports what it runs when it runs.

``multikd --help`` must answer within a second, and torch alone takes longer to import.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from multikd import __version__
from multikd.console import messages_on_stderr, take_over_lightning
from multikd.errors import unknown_name
from multikd.imports import allowing
from multikd.redaction import redact

LIGHTNING = {
    "fit": "train a student from a config (see `multikd fit --help`, `multikd configs`)",
    "validate": "losses and k-NN probe of a checkpoint on the validation shards",
    "test": "the same on the test shards",
    "predict": "write the student's features of a set of shards",
}

EPILOG = """\
first steps:
  multikd demo                              three real teachers, one trained student, five minutes
  multikd shards write PHOTOS/ my-shards/   an image folder (class = folder) as shards
  multikd fit --config laptop --data.train=my-shards/   train on them
  multikd teachers inspect timm:vit_small_patch14_dinov2   what a teacher gives

`multikd COMMAND --help` explains each command with examples.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, raised as a ValueError."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command's own parser says what it does not know, so that its options are offered."""
        found, rest = super().parse_known_args(args, namespace)
        passed_on = getattr(found, "passes_settings_on", False)
        if rest and self._subparsers is None and not passed_on:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, with the nearest right name."""
        chosen = re.search(r"invalid choice: '([^']*)' \(choose from (.+)\)", message)
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if chosen:
            what = "command" if "COMMAND" in message else "value"
            choices = [name.strip(" '") for name in chosen.group(2).split(",")]
            raise unknown_name(what, chosen.group(1), choices)
        if unknown and unknown.group(1).startswith("-"):
            option = unknown.group(1).split("=")[0]
            raise unknown_name("option", option, _options(self), f"(`{self.prog} --help`)")
        if unknown:
            raise ValueError(
                f"unexpected argument {unknown.group(1)!r}: give all of them side by side, before "
                f"the options (`{self.prog} --help` explains)"
            )
        raise ValueError(f"{message} (`{self.prog} --help` explains)")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Long options of a parser and of the commands below it."""
    found = [o for a in parser._actions for o in a.option_strings if o.startswith("--")]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found += _options(child)
    return sorted(set(found))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but Lightning's four, which parse for themselves."""
    parser = _Parser(
        prog="multikd",
        allow_abbrev=False,
        description="Distil several frozen foundation-model teachers into one generalist student.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"multikd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)
    _add_demo(commands)
    _add_shards(commands)
    _add_teachers(commands)
    _add_cache(commands)
    _add_evaluate(commands)
    _add_ablate(commands)
    _add_stages(commands)
    _add_sizes(commands)
    _add_pseudolabel(commands)
    _add_export(commands)
    _add_import(commands)
    _add_plan(commands)
    _add_configs(commands)
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, epilog: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=function)
    return parser


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "distil three real teachers into a small student on embedded images, and score it",
        "examples:\n  multikd demo\n  multikd demo --quick --out /tmp/demo\n"
        "  multikd demo --all --json demo.json   also one student per single teacher\n",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("multikd-demo"),
        metavar="DIR",
        help="folder for everything it writes (default: multikd-demo)",
    )
    parser.add_argument("--epochs", type=int, default=None, help="epochs to train (default: 20)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer images and epochs: under a minute and a half, lower scores",
    )
    parser.add_argument(
        "--student",
        choices=("resnet", "vit"),
        default="resnet",
        help="resnet10t (default) or a small ViT, both from scratch",
    )
    parser.add_argument(
        "--all", action="store_true", help="also distil each teacher alone (three more runs)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier demo left in DIR"
    )
    _json_argument(parser)


def _add_shards(commands: Any) -> None:
    group = commands.add_parser("shards", help="write or inspect webdataset shards")
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    write = _command(
        actions,
        "write",
        _shards_write,
        "pack images into webdataset tar shards with an index",
        "SOURCE is one of\n"
        "  DIR                         an image folder; each sub-folder is a class\n"
        "  torchvision:NAME:ROOT[:SPLIT]   a torchvision data set\n"
        "  idx:IMAGES:LABELS           MNIST-style IDX files (.gz or not)\n"
        "  FILE.csv / FILE.parquet     a table with a 'path' and, if any, a 'label' column\n"
        "\nRun again after an interruption: finished shards are kept.\n",
    )
    write.add_argument("source", metavar="SOURCE")
    write.add_argument("out", type=Path, metavar="OUT")
    write.add_argument("--samples-per-shard", type=int, default=10_000)
    write.add_argument(
        "--shard-mb",
        type=float,
        default=256.0,
        help="close a shard at this size, too (default: 256)",
    )
    write.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")
    write.add_argument(
        "--resize",
        type=int,
        default=None,
        metavar="SHORT_SIDE",
        help="shrink images to this short side (default: kept as they are)",
    )
    write.add_argument(
        "--format",
        choices=("jpeg", "png", "webp"),
        default=None,
        help="re-encode images (default: kept as they are)",
    )
    write.add_argument("--quality", type=int, default=90)
    write.add_argument("--limit", type=int, default=None, help="take this many images only")
    write.add_argument(
        "--classes-from",
        default=None,
        metavar="SHARDS",
        help="number the classes as these shards do (for a validation set)",
    )
    write.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    write.add_argument("--no-shuffle", action="store_true", help="keep the source's order")
    write.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    _json_argument(write)
    inspect = _command(
        actions,
        "inspect",
        _shards_inspect,
        "count, decode and time the samples of shards",
        "examples:\n  multikd shards inspect my-shards/\n"
        "  multikd shards inspect 'train-{000..099}.tar' --limit 2000\n",
    )
    inspect.add_argument("urls", nargs="+", metavar="URL")
    inspect.add_argument("--limit", type=int, default=None, help="decode this many samples only")
    _json_argument(inspect)


def _add_teachers(commands: Any) -> None:
    group = commands.add_parser("teachers", help="list or inspect teacher models")
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = _command(
        actions,
        "list",
        _teachers_list,
        "list models that can be teachers",
        "examples:\n  multikd teachers list 'timm:*dinov2*'\n  multikd teachers list packaged\n",
    )
    listing.add_argument("pattern", nargs="?", default="*")
    _json_argument(listing)
    inspect = _command(
        actions,
        "inspect",
        _teachers_inspect,
        "show what a teacher gives: widths, grid, normalisation, licence, and one image's features",
        "examples:\n  multikd teachers inspect packaged:efficientnet_lite0\n"
        "  multikd teachers inspect timm:vit_base_patch16_224.dino --checkpoint dino.safetensors\n",
    )
    inspect.add_argument("name", metavar="NAME")
    inspect.add_argument("--checkpoint", type=Path, default=None, help="weights from a local file")
    inspect.add_argument("--image", type=Path, default=None, help="an image to run")
    _json_argument(inspect)
    stats = _command(
        actions,
        "stats",
        _teachers_stats,
        "measure the statistics of a config's teachers for PHI-S, whitening and standardisation",
        "Everything else is passed on as to `multikd fit`.\n\nexamples:\n"
        "  multikd teachers stats --config laptop --data.train=shards/ --out s.safetensors\n"
        "  multikd fit --config laptop --data.train=shards/ \\\n"
        "    --model.normalizers=PHISNormalizers --model.normalizers.statistics=s.safetensors\n",
    )
    stats.add_argument("--out", type=Path, required=True, metavar="FILE")
    stats.add_argument(
        "--images", type=int, default=8192, help="how many training views of each (default: 8192)"
    )
    stats.add_argument(
        "--teachers", default="", metavar="A,B", help="these of its teachers (default: all)"
    )
    stats.add_argument("--overwrite", action="store_true", help="replace FILE")
    stats.set_defaults(passes_settings_on=True)
    _json_argument(stats)
    compare = _command(
        actions,
        "compare",
        _teachers_compare,
        "say which teachers of a config complement one another, and which to take",
        "Looks at images of data.val (else data.train); with labels it also says what the best\n"
        "teacher misses and another knows. Everything else is passed on as to `multikd fit`.\n"
        "\nexamples:\n"
        "  multikd teachers compare --config laptop --data.train=shards/ --out compared/\n",
    )
    compare.add_argument("--images", type=int, default=2000, help="how many (default: 2000)")
    compare.add_argument("--out", type=Path, default=None, metavar="DIR", help="page and figures")
    compare.add_argument(
        "--least",
        type=float,
        default=0.01,
        help="what a teacher must add to be recommended (default: 0.01)",
    )
    compare.set_defaults(passes_settings_on=True)
    _json_argument(compare)
    head = _command(
        actions,
        "fit-head",
        _teachers_fit_head,
        "fit a linear classifier on the features of a config's teachers, so that they give logits",
        "The teachers see the config's evaluation views. Everything else is passed on as to\n"
        "`multikd fit`.\n\nexamples:\n"
        "  multikd teachers fit-head --config classics/response \\\n"
        "    --data multikd-demo/shards/train --out multikd-demo/heads\n"
        "  multikd teachers fit-head --encoder timm:vit_small_patch14_dinov2 --data shards/ \\\n"
        "    --out head.safetensors\n",
    )
    head.add_argument("--encoder", default=None, metavar="NAME", help="in place of a config")
    calibrating = _command(
        actions,
        "calibrate",
        _teachers_calibrate,
        "find the temperature of each teacher's logits on held-out labels",
        "Of two classes, temperature and bias (Platt). The expected calibration error is told\n"
        "before and after. Everything else is passed on as to `multikd fit`.\n\nexamples:\n"
        "  multikd teachers calibrate --config classics/response --data held-out/ \\\n"
        "    --out calibrated.yaml\n"
        "  multikd fit --config classics/response --model.teachers=calibrated.yaml\n",
    )
    for action, kind, needed in (
        (head, "FILE.safetensors or folder", True),
        (calibrating, "YAML of the calibrated teachers", False),
    ):
        action.add_argument("--data", required=True, metavar="SHARDS", help="labelled shards")
        action.add_argument("--out", type=Path, required=needed, metavar="PATH", help=kind)
        action.add_argument(
            "--teachers", default="", metavar="A,B", help="these of its teachers (default: all)"
        )
        action.add_argument("--overwrite", action="store_true", help="replace what is there")
        action.set_defaults(passes_settings_on=True)
        _json_argument(action)


def _add_cache(commands: Any) -> None:
    parser = _command(
        commands,
        "cache",
        _cache,
        "run a config's teachers once over every recorded view and keep their features",
        "Everything else is passed on as to `multikd fit`. Run again after an interruption: what\n"
        "is there is kept, what does not fit its checksum is computed again.\n\nexamples:\n"
        "  multikd cache --config demo --out features/ --dry-run\n"
        "  multikd cache --config laptop --data.train=shards/ --data.train_views.recorded=4 \\\n"
        "    --storage int8 --out features/\n"
        "  multikd fit --config laptop --data.train=shards/ --data.train_views.recorded=4 \\\n"
        "    --data.cache=features/\n",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the cache")
    parser.add_argument(
        "--dry-run", action="store_true", help="say size and time for each teacher, write nothing"
    )
    parser.add_argument(
        "--storage",
        choices=("float32", "float16", "bfloat16", "int8"),
        default=None,
        help="number format (the rest is --data.cache_storage.…: patch_dtype, pca, patch_pca, "
        "patch_grid, patch_sample)",
    )
    parser.set_defaults(passes_settings_on=True)
    _json_argument(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "score encoders on tasks: what the student kept of every teacher",
        "ENCODER is one of (NAME=ENCODER gives it a name)\n"
        "  FILE.ckpt                   a checkpoint of `multikd fit`: the student, its heads and,\n"
        "                              with --with-teachers, the run's teachers\n"
        "  DIR                         a folder that `multikd export` wrote\n"
        "  timm:NAME, open_clip:NAME/TAG, packaged:NAME    (timm:NAME@FILE: weights of your own)\n"
        "  package.module.Class        a class of your own\n"
        "\nexamples:\n"
        "  multikd evaluate multikd-demo/checkpoints/last.ckpt --tasks demo --with-teachers\n"
        "  multikd evaluate student/ rival=timm:resnet18.a1_in1k --tasks mine.yaml --out eval/\n"
        "  multikd evaluate last.ckpt --tasks demo --data fashion.test=other-shards/ --heads none\n"
        "  multikd evaluate --compare eval-a/results.json eval-b/results.json\n"
        "  multikd evaluate student/ --drift new-photos/ --reference old-photos/\n"
        "\n`multikd configs tasks/demo` prints a task file to start from. Features are computed\n"
        "once and kept under --cache; an interrupted run goes on where it stopped.\n",
    )
    parser.add_argument("encoders", nargs="*", metavar="ENCODER")
    parser.add_argument(
        "--tasks", metavar="FILE", help="task file, or the name of a shipped one (demo)"
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SET.SPLIT=SOURCE",
        help="another source for a split of the task file; may be repeated",
    )
    parser.add_argument(
        "--with-teachers",
        action="store_true",
        help="score the checkpoint's own teachers too, in float32",
    )
    parser.add_argument(
        "--heads",
        default="all",
        metavar="A,B",
        help="teachers whose heads on the student are scored, too; all (default) or none",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="of a checkpoint (default: the average where the run kept one)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of results.json, results.csv and report.html (default: multikd-evaluation)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of features (default: ~/.cache/multikd/evaluation)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, mps")
    parser.add_argument(
        "--devices", type=int, default=1, help="how many of them extract features (default: 1)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images a pass (default: 64)")
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="threads that read images (default: as many as processors, 16 at most)",
    )
    parser.add_argument(
        "--patch-dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of patch tokens on disk (default: float16)",
    )
    parser.add_argument("--no-cost", action="store_true", help="do not measure memory and latency")
    parser.add_argument(
        "--no-pictures", action="store_true", help="no nearest neighbours and patch components"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="put earlier results.json files side by side, the first being the reference",
    )
    parser.add_argument(
        "--drift", metavar="NEW", help="images that may have drifted away from --reference"
    )
    parser.add_argument("--reference", metavar="OLD", help="images such as the student learned on")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in DIR")
    _json_argument(parser)


def _add_ablate(commands: Any) -> None:
    parser = _command(
        commands,
        "ablate",
        _ablate,
        "find out which teachers (and settings) are worth it: train, score and rank combinations",
        "examples:\n"
        "  multikd ablate fashion_mnist --out study/ --dry-run\n"
        "  multikd ablate fashion_mnist --out study/\n"
        "  multikd ablate mine.yaml --out study/ --processes 4 --seeds 0,1,2,3,4\n"
        "  multikd ablate mine.yaml --out study/ --slurm slurm_partition=gpu timeout_min=120\n"
        "\n`multikd configs studies/fashion_mnist` prints a study to start from. Each run is an\n"
        "ordinary `multikd fit` in a folder of its own. The same command goes on where it was\n"
        "stopped; DIR/leaderboard.html is kept up to date meanwhile.\n",
    )
    parser.add_argument("study", metavar="STUDY", help="YAML file, or the name of a shipped study")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of every run (trainer.max_epochs=2); may be repeated",
    )
    parser.add_argument("--seeds", default=None, metavar="0,1,2", help="in place of the study's")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes, do nothing")
    parser.add_argument("--yes", action="store_true", help="run however many there are")
    parser.add_argument("--processes", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--live", action="store_true", help="no feature cache: teachers run")
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="one SLURM task a run, with these settings of submitit",
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="submitit's: local and debug try --slurm on this machine",
    )
    _json_argument(parser)


def _add_stages(commands: Any) -> None:
    parser = _command(
        commands,
        "stages",
        _stages,
        "run a chain of trainings, each of which builds on what earlier ones exported",
        "examples:\n"
        "  multikd stages born_again --out chain/ --dry-run\n"
        "  multikd stages born_again --out chain/\n"
        "  multikd stages mine.yaml --out chain/ --set data.train=shards/ "
        "--set first:seed_everything=1\n"
        "\n`multikd configs chains/born_again` prints a chain to start from. Each stage is an\n"
        "ordinary `multikd fit` in DIR/STAGE, then an export to DIR/STAGE/export, which later\n"
        "stages name as {stage:STAGE}. The same command goes on where it was stopped.\n",
    )
    parser.add_argument("chain", metavar="CHAIN", help="YAML file, or the name of a shipped chain")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[STAGE:]KEY=VALUE",
        help="a setting of every stage, or of one (trainer.max_epochs=2); may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build every stage from shapes alone, do nothing"
    )
    _json_argument(parser)


def _add_sizes(commands: Any) -> None:
    parser = _command(
        commands,
        "sizes",
        _sizes,
        "find the smallest student that is as good as larger ones, within a budget of this device",
        "examples:\n"
        "  multikd sizes resnets --out sizes/ --dry-run      measure, train nothing\n"
        "  multikd sizes resnets --out sizes/\n"
        "\n`multikd configs sizes/resnets` prints a search to start from. Latency and memory of\n"
        "every size are measured here first; those within the budget are trained from the\n"
        "smallest up, until the score levels off. The same command goes on where it stopped.\n",
    )
    parser.add_argument("search", metavar="SEARCH", help="YAML file, or a shipped search's name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of every run (trainer.max_epochs=2); may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure costs alone")
    _json_argument(parser)


def _add_pseudolabel(commands: Any) -> None:
    parser = _command(
        commands,
        "pseudolabel",
        _pseudolabel,
        "label shards with the teachers of a config, and write what they are sure of as new shards",
        "examples:\n"
        "  multikd pseudolabel --config mine --data unlabelled/ --out labelled/ --threshold 0.9\n"
        "  multikd fit --config mine --data.train='{few: {urls: few/}, many: {urls: labelled/}}'\n"
        "\nThe teachers need classifiers (`multikd teachers fit-head`). Every sample of the new\n"
        "shards has soft labels, the mean of the teachers' probabilities; true labels of the\n"
        "images are used for the report alone. Run again after an interruption: finished shards\n"
        "are kept.\n",
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="SHARDS", help="the images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the new shards")
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="least confidence (default: 0.9)"
    )
    parser.add_argument("--teachers", default="", metavar="A,B", help="only these (default: all)")
    _json_argument(parser)
    parser.set_defaults(passes_settings_on=True)


class _ListFormats(argparse.Action):
    """Like ``--version``: it needs no other argument."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from multikd.export.formats import format_table

        print(format_table())
        parser.exit()


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "write a trained student as a folder that timm and other software load",
        "The folder always holds the timm model, a model card and a manifest. Nothing is written\n"
        "unless every check passed.\n\nexamples:\n"
        "  multikd export runs/laptop/last.ckpt my-student/\n"
        "  multikd export runs/laptop/last.ckpt my-student/ --heads lite0 --formats onnx,pt2\n"
        "  multikd export runs/laptop/last.ckpt my-student/ --quantize onnx-static --data shards/\n"
        "  multikd export --list\n",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--list", action=_ListFormats, nargs=0, help="show the formats, what they need, and exit"
    )
    parser.add_argument(
        "--formats", default="timm", metavar="A,B", help="formats to write beside timm's (--list)"
    )
    parser.add_argument(
        "--quantize",
        default="",
        metavar="A,B",
        help="quantised formats: onnx-dynamic, onnx-static, int8, int4 (weights only)",
    )
    parser.add_argument(
        "--heads",
        default="",
        metavar="A,B",
        help="teachers whose heads are kept: they answer in the teacher's own feature space",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="the average of the student, or its last weights (default: the "
        "average where the run kept one)",
    )
    parser.add_argument(
        "--student",
        metavar="NAME",
        help="of a run of several students (mutual learning): the name or index of one "
        "(default: the best)",
    )
    parser.add_argument(
        "--classifier", action="store_true", help="keep the trained linear classifier"
    )
    parser.add_argument(
        "--output",
        choices=("pooled", "tokens"),
        default="pooled",
        help="what the timm model answers: one vector an image (default), or all tokens",
    )
    parser.add_argument(
        "--no-final-norm", action="store_true", help="leave out a ViT's norm behind its last block"
    )
    parser.add_argument(
        "--preprocessing",
        action="store_true",
        help="graphs take uint8 images of any size: crop, resize and normalise inside",
    )
    parser.add_argument("--opset", type=int, default=18, help="of ONNX (default: 18)")
    parser.add_argument(
        "--data",
        metavar="SHARDS",
        help="images to calibrate and compare on (default: the run's training shards)",
    )
    parser.add_argument(
        "--images", type=int, default=512, help="how many images to calibrate on (default: 512)"
    )
    parser.add_argument(
        "--prune",
        type=float,
        metavar="SHARE",
        help="cut this share of the channels inside first; distil it further afterwards",
    )
    parser.add_argument(
        "--max-cosine-loss",
        type=float,
        metavar="X",
        help="refuse a quantised file whose features are further from float than this",
    )
    parser.add_argument(
        "--max-agreement-loss",
        type=float,
        metavar="X",
        help="refuse a quantised file that changes a larger share of k-NN answers",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="results.json of `multikd evaluate` on this checkpoint, for the model card",
    )
    parser.add_argument(
        "--licence", help="of the weights (default: the most restrictive of what went in)"
    )
    parser.add_argument("--data-licence", default="", help="of the training data, for the card")
    parser.add_argument("--no-cost", action="store_true", help="do not measure the latency")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    _json_argument(parser)


def _add_import(commands: Any) -> None:
    parser = _command(
        commands,
        "import",
        _import,
        "turn a published student (UNIC, DUNE, Theia, RADIO, EUPE) into an export folder",
        "The file is one that you downloaded from its publisher; nothing is fetched, and nothing\n"
        "in it is run. The folder is what `multikd export` writes: timm loads it, and it can be a\n"
        "teacher (`encoder: exported:OUT`) and a student's start. Its card names the\n"
        "publisher's licence; most of them allow no commercial use.\n\nexamples:\n"
        "  multikd import unic.pth --out unic/\n"
        "  multikd import dune_vitbase14_448.pth --out dune/ --json dune.json\n"
        "  multikd import c-radio_v3-b_half.pth.tar --out radio/ --image-size 768\n",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--kind",
        default="auto",
        metavar="KIND",
        help="unic, dune, theia, radio, eupe, or auto (default: by the file's layout)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="for which RADIO's positions are resampled as published (default: 512), or EUPE's "
        "size (default: 256); the others say theirs",
    )
    parser.add_argument(
        "--summary",
        metavar="TEACHER",
        help="RADIO has a class token for each teacher: whose is the summary (default: the first)",
    )
    parser.add_argument(
        "--num-heads", type=int, metavar="N", help="of the attention, where the file does not say"
    )
    parser.add_argument(
        "--no-final-norm", action="store_true", help="leave out the norm behind the last block"
    )
    parser.add_argument("--licence", help="of the weights (default: the publisher's)")
    parser.add_argument("--no-cost", action="store_true", help="do not measure the latency")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    _json_argument(parser)


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        _plan,
        "count a config's parameters, memory and FLOP, and predict images/s and days on GPUs",
        "No weights are fetched and nothing is trained. Everything else is passed on as to\n"
        "`multikd fit`.\n\nexamples:\n  multikd plan unic_vitb16_imagenet\n"
        "  multikd plan laptop --gpus a100,h100,b200 --data.batch_size=256\n",
    )
    parser.add_argument("config", metavar="CONFIG", help="name of a shipped config, or a file")
    parser.add_argument(
        "--gpus", default="a100,h100", metavar="A,B", help="a100, h100, h200, b200, mi300x"
    )
    parser.add_argument(
        "--images", type=int, default=1_281_167, help="in an epoch (default: ImageNet-1K's)"
    )
    parser.set_defaults(passes_settings_on=True)
    _json_argument(parser)


def _plan(arguments: argparse.Namespace) -> int:
    from multikd.plan.commands import run_plan

    take_over_lightning()
    text, figures = run_plan(
        [f"--config={arguments.config}", *arguments.settings],
        gpus=_names(arguments.gpus),
        images=arguments.images,
    )
    return _finish(text, figures, arguments.json)


def _add_configs(commands: Any) -> None:
    parser = _command(
        commands,
        "configs",
        _configs,
        "list the shipped configs, or print one",
        "examples:\n  multikd configs\n  multikd configs laptop > mine.yaml\n",
    )
    parser.add_argument("name", nargs="?", default=None)


def _finish(text: str, figures: dict[str, Any], target: Path | None) -> int:
    if text:
        print(text)
    if target is not None:
        from multikd.files import write_text_atomically

        write_text_atomically(target, json.dumps(figures, indent=2, default=str) + "\n")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from multikd.demo.run import DemoSettings, run_demo

    take_over_lightning()
    settings = DemoSettings(
        out=arguments.out,
        epochs=arguments.epochs,
        quick=arguments.quick,
        student=arguments.student,
        every_teacher=arguments.all,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    text, figures = run_demo(settings)
    return _finish(text, figures, arguments.json)


def _shards_write(arguments: argparse.Namespace) -> int:
    from multikd.data.commands import run_write

    text, figures = run_write(
        arguments.source,
        str(arguments.out),
        samples_per_shard=arguments.samples_per_shard,
        size_mb=arguments.shard_mb,
        workers=arguments.workers,
        resize=arguments.resize,
        format=arguments.format,
        quality=arguments.quality,
        limit=arguments.limit,
        seed=arguments.seed,
        shuffle=not arguments.no_shuffle,
        classes_from=arguments.classes_from,
        overwrite=arguments.overwrite,
    )
    return _finish(text, figures, arguments.json)


def _shards_inspect(arguments: argparse.Namespace) -> int:
    from multikd.data.commands import run_inspect

    text, figures = run_inspect(arguments.urls, limit=arguments.limit)
    return _finish(text, figures, arguments.json)


def _teachers_list(arguments: argparse.Namespace) -> int:
    from multikd.teachers.commands import run_list

    text, figures = run_list(arguments.pattern)
    return _finish(text, figures, arguments.json)


def _teachers_inspect(arguments: argparse.Namespace) -> int:
    from multikd.teachers.commands import run_inspect

    text, figures = run_inspect(
        arguments.name, checkpoint=arguments.checkpoint, image=arguments.image
    )
    return _finish(text, figures, arguments.json)


def _needs_run(arguments: argparse.Namespace, command: str, done: str) -> None:
    """Refuse a command about a run's teachers that names no run."""
    if not arguments.settings:
        raise ValueError(
            f"{command} needs the run whose teachers are {done}: --config NAME_OR_FILE "
            "(and --data.train=SHARDS)"
        )


def _names(text: str) -> list[str]:
    """``a, b`` → a and b."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _cache(arguments: argparse.Namespace) -> int:
    from multikd.cache_command import run_cache

    _needs_run(arguments, "cache", "to be kept")
    take_over_lightning()
    settings = list(arguments.settings)
    if arguments.storage is not None:
        settings.append(f"--data.cache_storage.dtype={arguments.storage}")
    found = run_cache(settings, arguments.out, arguments.dry_run)
    return 0 if found is None else _finish(*found, arguments.json)


def _evaluate(arguments: argparse.Namespace) -> int:
    from multikd.retention import commands

    if arguments.compare:
        commands.only_compares(arguments.encoders, arguments.tasks, arguments.drift)
        text, figures = commands.run_compare(arguments.compare, arguments.out)
        return _finish(text, figures, arguments.json)
    settings = commands.EvaluateSettings(
        tasks=arguments.tasks or "",
        out=arguments.out or commands.OUT,
        data=tuple(arguments.data),
        heads=commands.split_heads(arguments.heads),
        with_teachers=arguments.with_teachers,
        weights=arguments.weights,
        cache=arguments.cache or commands.CACHE,
        device=arguments.device,
        devices=arguments.devices,
        batch_size=arguments.batch_size,
        workers=commands.WORKERS if arguments.workers is None else arguments.workers,
        patch_dtype=arguments.patch_dtype,
        cost=not arguments.no_cost,
        pictures=not arguments.no_pictures,
        overwrite=arguments.overwrite,
    )
    if arguments.drift or arguments.reference:
        found = commands.run_drift(
            arguments.encoders, arguments.drift, arguments.reference, settings
        )
    else:
        found = commands.run_evaluate(arguments.encoders, settings)
    if found is None:
        return 0
    failed = any(cell.get("error") for cell in found[1].get("cells", ()))
    return _finish(*found, arguments.json) or int(failed)


def _teachers_compare(arguments: argparse.Namespace) -> int:
    from multikd.ablation.compare import run_compare

    _needs_run(arguments, "teachers compare", "compared")
    take_over_lightning()
    text, figures = run_compare(
        arguments.settings, arguments.images, arguments.out, arguments.least
    )
    return _finish(text, figures, arguments.json)


def _ablate(arguments: argparse.Namespace) -> int:
    from multikd.ablation.commands import AblateSettings, run_ablate, split_seeds

    take_over_lightning()
    settings = AblateSettings(
        out=arguments.out,
        changes=tuple(arguments.set),
        seeds=split_seeds(arguments.seeds),
        dry_run=arguments.dry_run,
        yes=arguments.yes,
        processes=arguments.processes,
        slurm=tuple(arguments.slurm),
        cluster=arguments.cluster,
        live=arguments.live,
    )
    text, figures = run_ablate(arguments.study, settings)
    _finish(text, figures, arguments.json)
    return 1 if figures.get("progress", {}).get("failed") else 0


def _stages(arguments: argparse.Namespace) -> int:
    from multikd.stages.commands import StagesSettings, run_stages

    take_over_lightning()
    settings = StagesSettings(arguments.out, tuple(arguments.set), arguments.dry_run)
    text, figures = run_stages(arguments.chain, settings)
    return _finish(text, figures, arguments.json)


def _sizes(arguments: argparse.Namespace) -> int:
    from multikd.sizes.commands import SizesSettings, run_sizes

    take_over_lightning()
    settings = SizesSettings(arguments.out, tuple(arguments.set), arguments.dry_run)
    text, figures = run_sizes(arguments.search, settings)
    return _finish(text, figures, arguments.json)


def _pseudolabel(arguments: argparse.Namespace) -> int:
    from multikd.pseudolabels.commands import PseudolabelSettings, run_pseudolabel

    _needs_run(arguments, "pseudolabel", "asked")
    take_over_lightning()
    names = tuple(_names(arguments.teachers))
    asked = PseudolabelSettings(arguments.data, arguments.out, arguments.threshold, names)
    text, figures = run_pseudolabel(arguments.settings, asked)
    return _finish(text, figures, arguments.json)


def _teachers_stats(arguments: argparse.Namespace) -> int:
    from multikd.teacher_statistics import run_stats

    _needs_run(arguments, "teachers stats", "measured")
    take_over_lightning()
    names = _names(arguments.teachers)
    text, figures = run_stats(
        arguments.settings, arguments.out, arguments.images, names, arguments.overwrite
    )
    return _finish(text, figures, arguments.json)


def _teachers_fit_head(arguments: argparse.Namespace) -> int:
    from multikd.teacher_classifiers import run_fit_head

    if arguments.encoder is None:
        _needs_run(arguments, "teachers fit-head", "to get a classifier")
    take_over_lightning()
    found = run_fit_head(
        arguments.settings,
        arguments.data,
        arguments.out,
        _names(arguments.teachers),
        arguments.encoder,
        arguments.overwrite,
    )
    return _finish(*found, arguments.json)


def _teachers_calibrate(arguments: argparse.Namespace) -> int:
    from multikd.teacher_classifiers import run_calibrate

    _needs_run(arguments, "teachers calibrate", "calibrated")
    take_over_lightning()
    found = run_calibrate(
        arguments.settings,
        arguments.data,
        arguments.out,
        _names(arguments.teachers),
        arguments.overwrite,
    )
    return _finish(*found, arguments.json)


def _export(arguments: argparse.Namespace) -> int:
    from multikd.export.commands import ExportSettings, run_export, split_names
    from multikd.export.timm_folder import TimmOptions

    settings = ExportSettings(
        formats=split_names(arguments.formats),
        quantize=split_names(arguments.quantize),
        heads=split_names(arguments.heads),
        weights=arguments.weights,
        student=arguments.student,
        timm=TimmOptions(
            classifier=arguments.classifier,
            output=arguments.output,
            final_norm=not arguments.no_final_norm,
        ),
        preprocessing=arguments.preprocessing,
        opset=arguments.opset,
        data=arguments.data,
        images=arguments.images,
        prune=arguments.prune,
        max_cosine_loss=arguments.max_cosine_loss,
        max_agreement_loss=arguments.max_agreement_loss,
        results=arguments.results,
        licence=arguments.licence,
        data_licence=arguments.data_licence,
        cost=not arguments.no_cost,
        overwrite=arguments.overwrite,
    )
    text, figures = run_export(arguments.checkpoint, arguments.out, settings)
    return _finish(text, figures, arguments.json)


def _import(arguments: argparse.Namespace) -> int:
    from multikd.published.commands import ImportSettings, run_import
    from multikd.published.vit import Asked

    asked = Asked(arguments.image_size, arguments.num_heads, arguments.summary)
    settings = ImportSettings(
        kind=arguments.kind,
        asked=asked,
        final_norm=not arguments.no_final_norm,
        licence=arguments.licence,
        cost=not arguments.no_cost,
        overwrite=arguments.overwrite,
    )
    text, figures = run_import(arguments.file, arguments.out, settings)
    return _finish(text, figures, arguments.json)


def _configs(arguments: argparse.Namespace) -> int:
    from multikd.shipped import (
        find_config,
        shipped_chains,
        shipped_configs,
        shipped_fragments,
        shipped_searches,
        shipped_studies,
        shipped_tasks,
    )

    fragments = shipped_fragments()
    if arguments.name is not None:
        stem = arguments.name.removesuffix(".yaml")
        others = fragments | {f"tasks/{name}": path for name, path in shipped_tasks().items()}
        others |= {f"studies/{name}": path for name, path in shipped_studies().items()}
        others |= {f"chains/{name}": path for name, path in shipped_chains().items()}
        others |= {f"sizes/{name}": path for name, path in shipped_searches().items()}
        path = others[stem] if stem in others else find_config(arguments.name)
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    print("configs, for `multikd fit --config NAME`:")
    for name, path in shipped_configs().items():
        print(f"  {name:<28} {_first_line(path)}")
    print("\ntask files, for `multikd evaluate --tasks NAME` (`multikd configs tasks/NAME`):")
    for name, path in shipped_tasks().items():
        print(f"  {name:<28} {_first_line(path)}")
    print("\nstudies, for `multikd ablate NAME` (`multikd configs studies/NAME`):")
    for name, path in shipped_studies().items():
        print(f"  {name:<28} {_first_line(path)}")
    print("\nchains, for `multikd stages NAME` (`multikd configs chains/NAME`):")
    for name, path in shipped_chains().items():
        print(f"  {name:<28} {_first_line(path)}")
    print("\nsearches, for `multikd sizes NAME` (`multikd configs sizes/NAME`):")
    for name, path in shipped_searches().items():
        print(f"  {name:<28} {_first_line(path)}")
    print("\nfragments, for `--model.teachers.NAME=FRAGMENT` and `--model.student=FRAGMENT`:")
    for name, path in fragments.items():
        print(f"  {name + '.yaml':<34} {_first_line(path)}")
    return 0


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().lstrip("# ")


def _lightning(command: str, rest: Sequence[str]) -> int:
    if not rest:
        start = (
            "--config NAME_OR_FILE: start with `multikd fit --config laptop --data.train=SHARDS`"
            if command == "fit"
            else "--ckpt_path=FILE, the checkpoint of a run"
        )
        raise ValueError(
            f"{command} needs {start} (`multikd configs` lists the shipped configs, "
            f"`multikd {command} --help` every setting)"
        )
    rest, target = _without_json(rest)
    from multikd.fit import run_lightning
    from multikd.fit_summary import figures_of, fit_text

    take_over_lightning()
    begun = time.perf_counter()
    trainer = run_lightning([command, *rest]).trainer
    if not trainer.is_global_zero:
        return 0
    figures = figures_of(trainer, time.perf_counter() - begun)
    return _finish(fit_text(figures) if command == "fit" else "", figures, target)


def _without_json(args: Sequence[str]) -> tuple[list[str], Path | None]:
    """Arguments without ``--json FILE``, which Lightning does not know, and that file."""
    kept: list[str] = []
    target: Path | None = None
    pending = list(args)
    while pending:
        argument = pending.pop(0)
        if argument == "--json":
            if not pending:
                raise ValueError("--json needs a file: --json FILE")
            target = Path(pending.pop(0))
        elif argument.startswith("--json="):
            target = Path(argument.removeprefix("--json="))
        else:
            kept.append(argument)
    return kept, target


def _without_code(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without ``--allow_code PACKAGE[,…]``, which every command takes, and its packages.

    It lets configs, task files and checkpoints name classes of these packages.
    """
    kept: list[str] = []
    packages: list[str] = []
    pending = list(args)
    while pending:
        argument = pending.pop(0)
        option, equals, value = argument.partition("=")
        if option not in ("--allow_code", "--allow-code"):
            kept.append(argument)
            continue
        value = value if equals else (pending.pop(0) if pending else "")
        packages += value.split(",")
    return kept, packages


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    A user's mistake ends in one sentence on stderr and 2, a training run that broke down (a loss
    that is not finite) in one sentence and 1, an interruption in one line and 130, a run that was
    preempted or lost a rank, and should be started again, in one line and 75. ``--debug`` shows
    the traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        args, code = _without_code(args)
        with messages_on_stderr(), allowing(code):
            return _run(args)
    except KeyboardInterrupt as stop:
        lightning = args and args[0] in LIGHTNING and str(stop)
        _say(str(stop) if lightning else "interrupted; run the same command again to go on")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) went away: not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        ours = type(error).__module__.startswith("multikd.")
        if debug or (isinstance(error, RuntimeError) and not ours):
            raise
        _say(str(error))
        return int(getattr(error, "exit_code", 1 if isinstance(error, RuntimeError) else 2))


def _run(args: list[str]) -> int:
    if not args:
        build_parser().print_help()
        return 0
    if os.getcwd() not in sys.path:
        # Classes of one's own are found here, after everything that is installed.
        sys.path.append(os.getcwd())
    if args[0] in LIGHTNING:
        return _lightning(args[0], args[1:])
    parser = build_parser()
    arguments, rest = parser.parse_known_args(args)
    if rest and not getattr(arguments, "passes_settings_on", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.settings = rest
    function: Callable[[argparse.Namespace], int] = arguments.function
    return function(arguments)


def _say(sentence: str) -> None:
    """One line on stderr, below whatever a progress bar left there."""
    sys.stderr.write(f"multikd: {redact(' '.join(sentence.split()))}\n")


if __name__ == "__main__":
    raise SystemExit(main())
