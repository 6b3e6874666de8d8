"""The ``multikd`` command. Commands only: each imports what it runs when it runs.

``multikd --help`` must answer within a second, and torch alone takes longer to import.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from multikd import __version__

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


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but Lightning's four, which parse for themselves."""
    parser = argparse.ArgumentParser(
        prog="multikd",
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
    _add_export(commands)
    _add_configs(commands)
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, epilog: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
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


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "write a trained student as a folder that plain timm loads",
        "example:\n  multikd export runs/last.ckpt my-student/\n"
        "  python -c \"import timm; timm.create_model('local-dir:my-student', pretrained=True, num_classes=0)\"\n",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="the average of the student, or its last weights (default: the "
        "average where the run kept one)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    _json_argument(parser)


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
    print(text)
    if target is not None:
        from multikd.files import write_text_atomically

        write_text_atomically(target, json.dumps(figures, indent=2, default=str) + "\n")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from multikd.demo.run import DemoSettings, run_demo

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


def _export(arguments: argparse.Namespace) -> int:
    from multikd.export.commands import run_export

    text, figures = run_export(
        arguments.checkpoint,
        arguments.out,
        weights=arguments.weights,
        overwrite=arguments.overwrite,
    )
    return _finish(text, figures, arguments.json)


def _configs(arguments: argparse.Namespace) -> int:
    from multikd.shipped import find_config, shipped_configs

    if arguments.name is not None:
        print(find_config(arguments.name).read_text(encoding="utf-8"), end="")
        return 0
    for name, path in shipped_configs().items():
        with path.open(encoding="utf-8") as file:
            first = file.readline().strip()
        print(f"{name:<28} {first.lstrip('# ') if first.startswith('#') else ''}")
    return 0


def _lightning(command: str, rest: Sequence[str]) -> int:
    from multikd.fit import run_lightning

    run_lightning([command, *rest])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. User errors end in one sentence on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "urllib3", "matplotlib", "PIL", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if args and args[0] in LIGHTNING:
            return _lightning(args[0], args[1:])
        arguments = build_parser().parse_args(args)
        function: Callable[[argparse.Namespace], int] = arguments.function
        return function(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; run the same command again to go on\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) went away: not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        sys.stderr.write(f"multikd: {error}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
