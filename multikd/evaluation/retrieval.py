"""Image retrieval by cosine similarity: mean average precision and recall at k.

As DINOv2 (Oquab et al., arXiv 2304.07193, section 7.3) and the metric learning benchmarks report
it: rank the gallery by cosine similarity to the query, an image of the query's class is relevant.
Average precision is Σ precision(rank of each relevant) / relevant, over
the whole ranking; recall@k is the share of queries with a relevant image among the k nearest
(Jégou et al. 2011).

Shapes: M gallery images, B queries, D width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.labelled import by_groups, check_groups
from multikd.evaluation.patch_probe import readable_rows
from multikd.evaluation.task import EvalSplit, Request, Subject, Task, TaskResult
from multikd.types import EncoderSpec

Rows = npt.NDArray[np.float64]


class Ranking(NamedTuple):
    """One row a query, float64; NaN where the gallery has nothing relevant."""

    average_precision: Tensor  # (B,)
    first_relevant: Tensor  # (B,) rank from 1 of the nearest relevant image


def rank_gallery(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    same: bool = False,
    chunk: int = 256,
) -> Ranking:
    """Average precision and first hit of every query; equally near images rank by index.

    Args:
        gallery: ``(M, D)``.
        gallery_labels: int64 ``(M,)``.
        queries: ``(B, D)``.
        query_labels: int64 ``(B,)``.
        same: queries are the gallery (B = M): each leaves itself out.
        chunk: queries ranked at once; memory is about 40 · ``chunk`` · M bytes.

    Raises:
        ValueError: shapes that do not fit, an empty gallery, or values that are not finite.
    """
    if gallery.ndim != 2 or queries.ndim != 2 or gallery.shape[1] != queries.shape[1]:
        raise ValueError(
            "gallery and queries must be (M, D) and (B, D) of one width, received "
            f"{tuple(gallery.shape)} and {tuple(queries.shape)}"
        )
    if len(gallery_labels) != len(gallery) or len(query_labels) != len(queries):
        raise ValueError(
            f"retrieval needs a label for each of {len(gallery)} + {len(queries)} images, received "
            f"{len(gallery_labels)} + {len(query_labels)}"
        )
    if len(gallery) < 1 + same or (same and len(gallery) != len(queries)) or chunk < 1:
        raise ValueError(
            f"retrieval needs a gallery and chunk of at least 1, received {len(gallery)} images "
            f"for {len(queries)} queries and chunk {chunk}"
        )
    for name, rows in (("gallery", gallery), ("queries", queries)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the features of the {name} must be finite, received NaN or infinity")
    bank = torch.nn.functional.normalize(gallery.detach().cpu().to(torch.float64), dim=1)
    ranks = torch.arange(1, len(gallery) + 1, dtype=torch.float64)
    precisions, firsts = [], []
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk].detach().cpu().to(torch.float64)
        similarity = torch.nn.functional.normalize(rows, dim=1) @ bank.T
        if same:
            # Last, where it counts for nothing.
            similarity[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -torch.inf
        order = similarity.argsort(dim=1, descending=True, stable=True)
        relevant = gallery_labels[order] == query_labels[start : start + chunk, None]
        if same:
            relevant[:, -1] = False
        hits = relevant.to(torch.float64)
        total = hits.sum(dim=1)
        # 0 / 0 is NaN: nothing relevant.
        precisions.append((hits.cumsum(dim=1) / ranks * hits).sum(dim=1) / total)
        first = torch.where(relevant, ranks, torch.inf).amin(dim=1)
        firsts.append(torch.where(total > 0, first, torch.nan))
    empty = torch.zeros(0, dtype=torch.float64)
    return Ranking(
        torch.cat(precisions) if precisions else empty, torch.cat(firsts) if firsts else empty
    )


@dataclass
class Retrieval(Task):
    """Mean average precision over queries with something to find; recall@k in the metrics.

    Args:
        data: a data set with labels.
        gallery: ``train``: test images look among the train images; ``test``: among one another,
            each leaving itself out (CUB, SOP, …; no train split is needed).
        k: of recall@k.
        groups: columns of the test split's metadata to score by.
        chunk: queries ranked at once.
    """

    data: str
    gallery: Literal["train", "test"] = "train"
    k: tuple[int, ...] = (1, 5, 10)
    groups: tuple[str, ...] = ()
    chunk: int = 256

    metric = "mAP"
    source = "Oquab et al. 2023, arXiv 2304.07193, section 7.3"

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or self.chunk < 1:
            raise ValueError(
                f"k and chunk must be at least 1, received {tuple(self.k)} and {self.chunk}"
            )
        self.splits = ("train", "test") if self.gallery == "train" else ("test",)  # type: ignore[misc]

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Summaries of queries and gallery."""
        del spec
        return [Request(split) for split in self.splits]

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses data without one label an image, and queries with nothing to find."""
        super().check(splits, specs)
        for name in self.splits:
            labels = splits[name].labels
            if labels is None or labels.ndim != 1:
                raise ValueError(
                    f"Retrieval on {self.data!r} needs one label for each image, which the split "
                    f"{splits[name].name} lacks: give labelled data"
                )
        queries, gallery = (_known(splits[name]) for name in ("test", self.gallery))
        shared = np.intersect1d(queries, gallery)
        if self.gallery == "test":
            values, counts = np.unique(gallery, return_counts=True)
            shared = values[counts > 1]
        if not len(shared):
            raise ValueError(
                f"Retrieval on {self.data!r}: no query has an image of its class in the gallery, "
                "so there is nothing to find"
            )
        check_groups(self.groups, splits)

    def score(self, subject: Subject) -> TaskResult:
        """mAP; ``per_sample`` is each query's average precision, NaN with nothing to find."""
        encoded = {name: subject.features(name) for name in self.splits}
        begun = time.perf_counter()
        rows = {name: readable_rows(encoded[name], subject.splits[name]) for name in encoded}
        features, labels = {}, {}
        for name, kept in rows.items():
            summary, of_split = encoded[name].summary, subject.splits[name].labels
            if summary is None or of_split is None:
                raise ValueError(f"{subject.name} gave no summary of {subject.splits[name].name}")
            features[name], labels[name] = summary[kept], of_split[kept].clone()
        # Unlabelled images are relevant to nobody, and find nothing.
        labels["test"][labels["test"] < 0] = -1
        if self.gallery == "train":
            labels["train"][labels["train"] < 0] = -2
        else:
            unknown = labels["test"] < 0
            labels["test"][unknown] = -1 - torch.arange(int(unknown.sum()))
        ranking = rank_gallery(
            features[self.gallery],
            labels[self.gallery],
            features["test"],
            labels["test"],
            same=self.gallery == "test",
            chunk=self.chunk,
        )
        found = ~ranking.average_precision.isnan()
        if not bool(found.any()):
            raise ValueError(f"{subject.name}: no readable query has anything to find")
        per_sample = np.asarray(ranking.average_precision.numpy())
        details: dict[str, object] = {
            "images": int(found.sum()),
            "without anything to find": int((~found).sum()),
        }
        split = subject.splits["test"]
        if self.groups:
            places = torch.tensor(rows["test"])
            details["groups"] = by_groups(self.groups, split, places, per_sample, _mean)
        return TaskResult(
            _mean(per_sample),
            per_sample=per_sample,
            statistic=_mean,
            metrics={
                f"recall@{k}": float((ranking.first_relevant[found] <= k).double().mean())
                for k in self.k
            },
            details=details,
            seconds=time.perf_counter() - begun,
        )


def _mean(rows: Rows) -> float:
    known = rows[~np.isnan(rows)]
    if not len(known):
        raise ValueError("no query has anything to find")
    return float(known.mean())


def _known(split: EvalSplit) -> npt.NDArray[np.int64]:
    labels = split.labels
    if labels is None:
        return np.zeros(0, dtype=np.int64)
    return np.asarray(labels[labels >= 0].numpy(), dtype=np.int64)
