"""k-NN and features over image sizes: whether an encoder changes its mind with resolution.

Agglomerative models trained at two resolutions show a "mode switch": features of one image at low
and at high resolution differ in kind (Heinrich et al., "RADIOv2.5", arXiv 2412.07679, section 3.1).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from multikd.evaluation.knn import knn_predict
from multikd.evaluation.labelled import check_labels, class_names
from multikd.evaluation.task import EvalSplit, Request, Subject, Task, TaskResult
from multikd.types import EncoderSpec


@dataclass
class ResolutionSweep(Task):
    """k-NN top-1 over image sizes, mean over the sizes.

    For each size: top-1 with the train split at the same size; top-1 with the train split at the
    **reference** size, which falls where features change their kind; and the mean cosine of each
    test image's features with its own at the reference size. ``mode switch`` is the largest fall of
    that cosine between neighbouring sizes.

    Args:
        data: a data set with a train and a test split.
        sizes: sides in pixels, two or more.
        reference: one of them; None takes the largest.
        k: neighbours that vote.
        temperature: of their votes.
    """

    data: str
    sizes: tuple[int, ...]
    reference: int | None = None
    k: int = 20
    temperature: float = 0.07

    metric = "top1 over sizes"
    source = "k-NN: Wu et al. 2018; mode switch: Heinrich et al. 2024, arXiv 2412.07679"

    def __post_init__(self) -> None:
        self.sizes = tuple(sorted(set(self.sizes)))
        if len(self.sizes) < 2 or self.sizes[0] < 1:
            raise ValueError(
                f"a resolution sweep needs two sizes or more, received {list(self.sizes)}"
            )
        if self.reference is None:
            self.reference = self.sizes[-1]
        if self.reference not in self.sizes:
            raise ValueError(
                f"the reference size {self.reference} must be one of {list(self.sizes)}"
            )
        if self.k < 1 or self.temperature <= 0:
            raise ValueError(
                "k must be at least 1 and temperature above 0, received "
                f"{self.k} and {self.temperature}"
            )

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Both splits at every size."""
        del spec
        return [Request(s, ("summary",), (n, n)) for s in self.splits for n in self.sizes]

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses encoders of one size, and labels that can't be scored."""
        super().check(splits, specs)
        check_labels(splits, "ResolutionSweep")
        for name, spec in specs.items():
            if spec.fixed_size:
                raise ValueError(
                    f"ResolutionSweep on {self.data!r}: the encoder {name!r} takes images of "
                    f"{spec.image_size[0]} px only: leave one of them out"
                )
        labels = splits["train"].labels
        voters = 0 if labels is None else int((labels >= 0).sum())
        if self.k > voters:
            raise ValueError(
                f"ResolutionSweep asks {self.k} neighbours and {splits['train'].name} has {voters} "
                "labelled images: use a smaller k"
            )

    def score(self, subject: Subject) -> TaskResult:
        """Mean top-1; ``per_sample`` is each image's share of right answers over sizes."""
        features = {
            (split, size): self._rows(subject, split, size)
            for split in self.splits
            for size in self.sizes
        }
        begun = time.perf_counter()
        classes = len(class_names(subject.splits, self.splits))
        reference = self.reference or self.sizes[-1]
        right: list[Tensor] = []
        crossed: list[Tensor] = []
        cosines: list[Tensor] = []
        truth = features["test", reference][1]
        at_reference = features["test", reference][0]
        for size in self.sizes:
            asked, _ = features["test", size]
            for bank_size, found in ((size, right), (reference, crossed)):
                bank, labels = features["train", bank_size]
                answers = knn_predict(bank, labels, asked, self.k, self.temperature, classes)
                found.append((answers.cpu() == truth).double())
            cosines.append(torch.cosine_similarity(asked.double(), at_reference.double()).mean())
        shares, across = torch.stack(right, dim=1), torch.stack(crossed, dim=1)
        cosine = torch.stack(cosines)
        per_sample = np.asarray(shares.mean(dim=1).numpy())
        names = [str(size) for size in self.sizes]
        return TaskResult(
            float(per_sample.mean()),
            per_sample,
            metrics={
                "mode switch": float(cosine.diff().abs().max()),
                **{f"top1 at {n}": float(v) for n, v in zip(names, shares.mean(0), strict=True)},
            },
            details={
                "curve": {
                    "size": list(self.sizes),
                    "top1": shares.mean(dim=0).tolist(),
                    "top1 with the reference's neighbours": across.mean(dim=0).tolist(),
                    "cosine with the reference": cosine.tolist(),
                },
                "reference": reference,
                "images": len(truth),
            },
            seconds=time.perf_counter() - begun,
        )

    def _rows(self, subject: Subject, split: str, size: int) -> tuple[Tensor, Tensor]:
        """Readable, labelled summaries and labels."""
        encoded = subject.features(split, ("summary",), (size, size))
        of_split = subject.splits[split]
        if encoded.summary is None or of_split.labels is None:
            raise ValueError(f"{subject.name} gave no summary of {of_split.name}")
        faulty = set(encoded.faults)
        readable = torch.tensor([key not in faulty for key in of_split.keys], dtype=torch.bool)
        kept = (readable & (of_split.labels.cpu() >= 0)).nonzero().flatten()
        return encoded.summary[kept].float(), of_split.labels.cpu()[kept]
