"""Encoders by name, each as the columns of the matrix that one forward pass of it fills.

A training checkpoint gives its student (head-off), the student through each teacher's head
(head-on: ladder, then the normaliser's inverse) and, when asked for, the teachers themselves in
float32. An exported folder gives its student and the heads it holds. Anything else is one column.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multikd.checkpoints import TrainedStudent, WeightChoice, load_student
from multikd.errors import unknown_name
from multikd.export.text import TextTower
from multikd.imports import only_allowed
from multikd.retention.digest import fingerprint
from multikd.types import EncoderSpec, Grid, TokenFeatures

Role = Literal["student", "head", "teacher", "encoder"]
OWN = ""  # the member of a network that is its own features; the others are heads
_NAMED = re.compile(r"^([A-Za-z0-9][\w .+-]*)=(.+)$")
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt")


@dataclass(frozen=True)
class TextSource:
    """Where the text tower is that a column's summaries can be compared with."""

    encoder: str  # open_clip:ARCHITECTURE/TAG
    checkpoint: str | None = None

    def open(self, device: torch.device | str = "cpu") -> TextTower:
        """Load it."""
        return TextTower(self.encoder, self.checkpoint, device)


@dataclass
class Column:
    """One encoder of the matrix.

    Attributes:
        name: what the matrix calls it.
        role: what it is.
        spec: widths, sizes, normalisation and licence, as scored.
        fingerprint: of weights and normalisation; equal for equal weights, whatever the name.
        source: where it was opened from.
        member: which answer of ``network`` it is.
        network: what runs; shared by the columns of one forward pass.
        head: the teacher whose head gives it.
        text: its text tower.
    """

    name: str
    role: Role
    spec: EncoderSpec
    fingerprint: str
    source: str
    member: str
    network: Network = field(repr=False)
    head: str | None = None
    text: TextSource | None = None


class Network(nn.Module):
    """Images → the features of every member, from one forward pass."""

    def forward(self, images: Tensor) -> dict[str, TokenFeatures]:
        """``images``: float ``(B, 3, H, W)`` in [0, 1]; differentiable."""
        raise NotImplementedError

    def check_size(self, size: Grid) -> None:
        """Refuse a size that it can't take.

        Raises:
            ValueError: from a run without data.
        """
        raise NotImplementedError

    def only(self, member: str) -> nn.Module:
        """A module that does no more than this member needs: what it costs is measured on it."""
        del member
        return self


class OneNetwork(Network):
    """Any encoder as it is: normalises for itself, frozen, float32.

    Batch norms are folded and convolutions laid out as for a teacher, which is what makes CNNs
    fast on a CPU.
    """

    def __init__(self, encoder: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> dict[str, TokenFeatures]:
        """See the base class."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return {OWN: self.encoder(images)}

    def check_size(self, size: Grid) -> None:
        """See the base class."""
        grid_for: Callable[[Grid], object] | None = getattr(self.encoder, "grid_for", None)
        if grid_for is not None:
            grid_for(size)


class CheckpointNetwork(Network):
    """A trained student and the ladders of some of its teachers."""

    def __init__(self, trained: TrainedStudent, heads: Sequence[str]) -> None:
        super().__init__()
        self.student = trained.student
        self.heads = []
        if heads:
            from multikd.export.trained_heads import trained_heads

            self.heads = trained_heads(trained, heads)
        parts = [part for head in self.heads for part in (head.ladder, head.normalizer)]
        self.parts = nn.ModuleList(parts)  # so that they move along

    def only(self, member: str) -> nn.Module:
        """See the base class."""
        chosen = copy.copy(self)
        chosen._modules = {"student": self.student}
        chosen.heads = [head for head in self.heads if head.name == member]
        parts = [part for head in chosen.heads for part in (head.ladder, head.normalizer)]
        chosen.parts = nn.ModuleList(parts)
        return chosen

    def forward(self, images: Tensor) -> dict[str, TokenFeatures]:
        """See the base class."""
        if not self.heads:
            return {OWN: self.student.features(images)}
        output = self.student(images)
        found = {OWN: output.features}
        for head in self.heads:
            grid = _scaled(head.grid, self.student.spec.image_size, images)
            prediction = head.ladder(output.rungs, {head.name: grid})[head.name]
            found[head.name] = head.normalizer.inverse(prediction)
        return found

    def check_size(self, size: Grid) -> None:
        """See the base class."""
        self.student.grids(size)


class FolderNetwork(Network):
    """What ``multikd export`` wrote: the student and its heads in plain PyTorch."""

    def __init__(
        self, model: Any, heads: Sequence[str], grid_for: Callable[[Grid], object]
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(heads)
        self._grid_for = grid_for

    def only(self, member: str) -> nn.Module:
        """See the base class."""
        names = (member,) if member != OWN else ()
        heads = nn.ModuleDict({name: self.model.heads[name] for name in names})
        model = copy.copy(self.model)
        model._modules = {**self.model._modules, "heads": heads}  # a copy shares its dictionaries
        return FolderNetwork(model, names, self._grid_for)

    def forward(self, images: Tensor) -> dict[str, TokenFeatures]:
        """See the base class."""
        own, heads = self.model.everything(images, self.names)
        found = {OWN: TokenFeatures(*own)}
        return found | {name: TokenFeatures(*features) for name, features in heads.items()}

    def check_size(self, size: Grid) -> None:
        """See the base class."""
        self._grid_for(size)


def _scaled(grid: Grid | None, size: Grid, images: Tensor) -> Grid | None:
    """The grid of a head for images of another size than the student was trained on."""
    now = (images.shape[-2], images.shape[-1])
    if grid is None or now == size:
        return grid
    return (
        max(1, round(grid[0] * now[0] / size[0])),
        max(1, round(grid[1] * now[1] / size[1])),
    )


# ---------------------------------------------------------------------------- opening by name


@dataclass(frozen=True)
class OpenOptions:
    """What the command line says of how encoders are opened.

    Attributes:
        weights: of a checkpoint: the average, the last weights, or the average where there is one.
        heads: ``all``, or names of teachers whose heads are columns.
        with_teachers: add a checkpoint's own teachers.
    """

    weights: WeightChoice = "auto"
    heads: Literal["all"] | Sequence[str] = ()
    with_teachers: bool = False


def open_encoders(texts: Sequence[str], options: OpenOptions | None = None) -> list[Column]:
    """The columns of the matrix for what a user named.

    Args:
        texts: ``[NAME=]ENCODER`` each: a training checkpoint, an exported folder, ``timm:…``,
            ``open_clip:…``, ``packaged:…`` (``timm:…@FILE``: weights of one's own), or the import
            path of a class.
        options: see ``OpenOptions``.

    Raises:
        ValueError: an encoder that can't be opened, a head that is not there, or two of one name.
    """
    asked = options or OpenOptions()
    columns: list[Column] = []
    heads: list[str] = []
    for text in texts:
        opened, known = open_encoder(text, asked)
        columns += opened
        heads += known
    for head in () if asked.heads == "all" else asked.heads:
        if head not in heads:
            where = f"(in {', '.join(texts)})"
            raise unknown_name("head", head, sorted(set(heads)), where)
    seen: dict[str, Column] = {}
    for column in list(columns):
        twin = seen.get(column.name)
        if (
            twin is not None
            and column.role == "teacher" == twin.role
            and (column.fingerprint == twin.fingerprint)
        ):
            columns.remove(column)  # the teacher that two students share
        elif twin is not None:
            raise ValueError(
                f"two encoders are called {column.name!r} ({twin.source} and {column.source}): "
                "name them apart with NAME=ENCODER"
            )
        seen.setdefault(column.name, column)
    return columns


def open_encoder(text: str, options: OpenOptions) -> tuple[list[Column], list[str]]:
    """The columns of one ``[NAME=]ENCODER``, and the heads that it has, asked for or not."""
    named = _NAMED.match(text)
    alias, place = (named.group(1), named.group(2)) if named else (None, text)
    path = Path(place).expanduser()
    if path.is_file():
        return _open_checkpoint(alias, path, options)
    if place.startswith("exported:"):
        path = Path(place.removeprefix("exported:")).expanduser()
    if path.is_dir():
        return _open_folder(alias, path, options)
    if place.endswith((".ckpt", "/")) or place.startswith(("./", "../", "/", "~")):
        raise ValueError(
            f"there is no encoder {place}: expected a checkpoint of `multikd fit`, an exported "
            "folder, or a name such as timm:NAME, open_clip:NAME/TAG, packaged:NAME"
        )
    return [_open_named(alias or place, place)], []


def _open_named(name: str, place: str) -> Column:
    from multikd.teachers import Teacher

    scheme, _, _ = place.partition(":")
    encoder, at, weights = place.rpartition("@")
    checkpoint = None
    if at and scheme in ("timm", "open_clip") and weights.endswith(_WEIGHTS):
        if not Path(weights).is_file():
            raise ValueError(f"there is no weight file {weights} for {encoder}: check the path")
        place, checkpoint = encoder, weights
    teacher = Teacher(place, resize="none", dtype="float32", checkpoint=checkpoint)
    text = TextSource(place, checkpoint) if scheme == "open_clip" else None
    return _teacher_column(teacher, name, "encoder", place, None, text)


def _teacher_column(
    teacher: Any, name: str, role: Role, source: str, size: Grid | None, text: TextSource | None
) -> Column:
    spec = dataclasses.replace(teacher.spec, name=name)
    if size is not None:
        spec = dataclasses.replace(spec, image_size=size)
    encoder = teacher.encoder
    network = OneNetwork(encoder, teacher.channels_last).eval()
    return Column(name, role, spec, fingerprint([encoder], spec), source, OWN, network, text=text)


def _open_checkpoint(
    alias: str | None, path: Path, options: OpenOptions
) -> tuple[list[Column], list[str]]:
    trained = load_student(path, options.weights)
    settings: dict[str, Any] = trained.config["model"].get("init_args", {})
    teachers: dict[str, Any] = settings.get("teachers") or {}
    state = trained.checkpoint.get("state_dict", {})
    # Terms alone compare the student with the others.
    able = [n for n in teachers if any(k.startswith(f"ladder.projectors.{n}.") for k in state)]
    heads = [name for name in able if options.heads == "all" or name in options.heads]
    network = CheckpointNetwork(trained, heads).eval().requires_grad_(False)
    name = alias or "student"
    columns = _student_columns(
        network,
        name,
        trained.student.spec,
        [trained.student],
        str(path),
        {h.name: [h.ladder, h.normalizer] for h in network.heads},
        {h.name: dict(h.facts) for h in network.heads},
    )
    if options.with_teachers:
        for teacher_name, of_run in teachers.items():
            columns.append(_run_teacher(trained, teacher_name, of_run))
    return columns, able


def _student_columns(
    network: Network,
    name: str,
    spec: EncoderSpec,
    own: Sequence[nn.Module],
    source: str,
    heads: Mapping[str, Sequence[nn.Module]],
    facts: Mapping[str, Mapping[str, str]],
) -> list[Column]:
    """The student's own column, and one a head, with the shapes of a run on blank images."""
    spec = dataclasses.replace(spec, name=name)
    columns = [Column(name, "student", spec, fingerprint(own, spec), source, OWN, network)]
    if not heads:
        return columns
    with torch.no_grad():
        found = network(torch.zeros(1, 3, *spec.image_size))
    for head, modules in heads.items():
        features = found[head]
        patch = spec.patch_size
        if features.grid is not None:
            patch = max(1, round(spec.image_size[0] / features.grid[0]))
        full = f"{name}+{head}"
        own_spec = dataclasses.replace(
            spec, name=full, widths=features.widths, patch_size=patch, num_classes=0
        )
        encoder = str(facts[head].get("encoder", ""))
        origin = str(facts[head].get("source", ""))
        text = None
        if encoder.startswith("open_clip:"):
            text = TextSource(encoder, origin if Path(origin).is_file() else None)
        key = fingerprint([*own, *modules], own_spec)
        columns.append(Column(full, "head", own_spec, key, source, head, network, head, text))
    return columns


def _run_teacher(trained: TrainedStudent, name: str, settings: dict[str, Any]) -> Column:
    """A teacher of a run, in float32, at the size at which it taught."""
    from multikd.teachers import Teacher

    taught = dict(settings.get("init_args") or {})
    policy = taught.get("resize", "own")
    init_args = {**taught, "dtype": "float32", "resize": "none"}
    try:
        teacher: Teacher = build(Teacher, {**settings, "init_args": init_args})
    except Exception as error:  # jsonargparse, timm and open_clip have errors of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"teacher {name!r} of the checkpoint can't be opened here ({reason}): install what it "
            "needs, or leave out --with-teachers"
        ) from error
    student = trained.student.spec
    teacher.resize = policy
    size = teacher.input_size(student.image_size, student.patch_size)
    teacher.resize = "none"
    encoder = str(taught.get("encoder", ""))
    text = None
    if encoder.startswith("open_clip:"):
        text = TextSource(encoder, taught.get("checkpoint"))
    return _teacher_column(teacher, name, "teacher", encoder or name, size, text)


def build(base: type[Any], settings: dict[str, Any]) -> Any:
    """An object of a typed config."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "object")
    with only_allowed():
        return parser.instantiate(parser.parse_object({"object": settings})).object


def _open_folder(
    alias: str | None, path: Path, options: OpenOptions
) -> tuple[list[Column], list[str]]:
    from multikd.export.folder import MANIFEST

    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is no exported student (it has no config.json): give a folder that "
            "`multikd export` wrote, or the .ckpt file of a run"
        )
    name = alias or path.resolve().name
    if not (path / MANIFEST).is_file():
        return [_open_named(name, f"exported:{path}")], []
    from multikd.export.load import load
    from multikd.teachers import BackboneEncoder

    loaded = load(path)
    heads = [h for h in loaded.heads if options.heads == "all" or h in options.heads]
    about = loaded.manifest
    licence = str(about.get("licence") or "") or None
    backbone = BackboneEncoder(loaded.model.encoder, name=name, licence=licence, source=str(path))
    network = FolderNetwork(loaded.model, heads, backbone.grid_for).eval().requires_grad_(False)
    columns = _student_columns(
        network,
        name,
        backbone.spec,
        [loaded.model.encoder],
        str(path),
        {h: [loaded.model.heads[h]] for h in heads},
        {h: loaded.model.about["heads"][h]["teacher"] for h in heads},
    )
    return columns, list(loaded.heads)
