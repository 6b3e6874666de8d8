"""Small students, teachers, batches and Trainers for tests that train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from multikd.modules import DistillationModule
from multikd.projectors import LinearProjectors
from multikd.students import StudentEncoder
from multikd.teachers import Teacher
from multikd.teachers.encoder import BackboneEncoder
from multikd.types import Batch, EncoderSpec, TokenFeatures, Widths


def teacher(name: str, size: int | None = None, seed: int = 1, **settings: Any) -> Teacher:
    """A frozen timm model with random weights (those of ``seed``) for images of ``size``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {} if size is None else {"img_size": size}
        try:
            model = timm.create_model(name, num_classes=0, **options)
        except TypeError:  # CNNs take any size
            model = timm.create_model(name, num_classes=0)
    return Teacher(BackboneEncoder(model, name=name, image_size=size), **settings)


class SummaryOnly(nn.Module):
    """An encoder of a user's own, without patches."""

    spec = EncoderSpec(
        "summary only", Widths(7, None), (16, 16), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 7)

    def forward(self, images: Tensor) -> TokenFeatures:
        return TokenFeatures(summary=self.layer(images.mean(dim=(2, 3))))


def summary_teacher() -> Teacher:
    """A teacher that gives a summary and no patches."""
    return Teacher(SummaryOnly())


@cache
def _shared(name: str, size: int, seed: int) -> Teacher:
    return teacher(name, size, seed)


def teachers(count: int = 3) -> dict[str, Teacher]:
    """Up to four little teachers of different widths and grids; the same ones every time."""
    kinds = {"vit": ("test_vit", 48), "cnn": ("test_resnet", 64), "next": ("test_convnext", 64)}
    kinds["gap"] = ("test_vit2", 32)
    return {name: _shared(*kind, 1) for name, kind in list(kinds.items())[:count]}


def student(
    name: str = "test_vit", size: int = 32, seed: int = 0, **settings: Any
) -> StudentEncoder:
    """A little student whose initial weights are those of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StudentEncoder(name, image_size=size, **settings)


def module(
    student_settings: dict[str, Any] | None = None, seed: int = 0, **settings: Any
) -> DistillationModule:
    """A module of little parts, the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {
            "teachers": teachers(),
            "projectors": LinearProjectors(),
            "lr_batch": None,
            **settings,
        }
        if "student" not in made:
            made["student"] = student(**(student_settings or {}))
        torch.manual_seed(seed)
        return DistillationModule(**made)


def batch(
    size: int = 32, count: int = 6, seed: int = 0, views: int = 1, positions: Tensor | None = None
) -> Batch:
    """Random images with labels 0 … 9."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return Batch(
        views=[
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            for _ in range(views)
        ],
        labels=torch.arange(count) % 10,
        keys=[f"image-{seed}-{i}" for i in range(count)],
        dataset=torch.zeros(count, dtype=torch.int64),
        positions=torch.arange(count) if positions is None else positions,
        samples=torch.arange(count),
    )


class Batches:
    """A loader of given batches (Lightning takes a list for several loaders)."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Data(pl.LightningDataModule):
    """A data module of given batches: training, then each of the validation loaders."""

    def __init__(self, train: Sequence[Batch] = (), *val: Sequence[Batch]) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> Batches:
        return Batches(*self.train)

    def val_dataloader(self) -> list[Batches]:
        return [Batches(*batches) for batches in self.val]


class Notes(pl.Callback):
    """Keeps what every training step computed."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.totals: list[float] = []
        self.weights: list[list[float]] = []
        self.keys: list[list[str]] = []
        self.norms: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, out: Any, batch: Any, index: int
    ) -> None:
        for record in module.last_records:
            means = record.losses.mean(dim=1).tolist()
            self.losses.append(dict(zip(record.names, means, strict=True)))
            self.totals.append(record.total.item())
            self.weights.append(record.lambdas.tolist())
            self.norms.append({name: value.item() for name, value in record.norms.items()})
        self.keys.append(batch.keys)


class Memory(Logger):
    """A logger that remembers."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def values(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]

    def steps(self, name: str) -> list[int | None]:
        return [step for step, row in self.rows if name in row]


def trainer(folder: Path | str, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """A Trainer on the CPU that says and writes nothing unless told to."""
    made: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**made, **settings})


class RankEnvironment(ClusterEnvironment):
    """For a Trainer inside ``helpers.ddp.run_ranks``, where a process group is running."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None: ...

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None: ...

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0


def ddp_trainer(folder: Path | str, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """A Trainer for one rank of ``run_ranks``: DDP over gloo as users get it."""
    made = {
        "strategy": DDPStrategy(process_group_backend="gloo"),
        "devices": dist.get_world_size(),
        "plugins": [RankEnvironment()],
    }
    return trainer(folder, *callbacks, **{**made, **settings})
