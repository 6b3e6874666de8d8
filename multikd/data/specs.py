"""Data sets by name: how a configuration names them, and what they are once opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multikd.data.dataset import SampleReader
from multikd.data.remote import is_remote
from multikd.data.views import ViewPolicy
from multikd.untrusted import read_json


@dataclass
class DatasetSpec:
    """One data set of a mixture.

    Attributes:
        urls: shards: path, folder, glob, brace range, http(s) address, or a list of these.
        weight: share of an epoch's samples that come from it, relative to the other data sets'.
        teachers: names of the teachers whose data it is (see ``model.teacher_data``).
        generic: it is for all teachers where generic data are.
        views: how its images are seen, in place of ``train_views``: as many, of the same sizes.
    """

    urls: str | list[str]
    weight: float = 1.0
    teachers: list[str] | None = None
    generic: bool = False
    views: ViewPolicy | list[ViewPolicy] | None = None

    def policies(self) -> list[ViewPolicy] | None:
        """Its own views as a list; None where it has none."""
        return [self.views] if isinstance(self.views, ViewPolicy) else self.views


@dataclass
class Opened:
    """Data sets of one role, opened and checked."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    reader: SampleReader

    @property
    def lengths(self) -> list[NDArray[np.int64]]:
        """Samples in each shard of each data set."""
        return [source.lengths for source in self.reader.sources]

    @property
    def samples(self) -> tuple[int, ...]:
        """Samples of each data set."""
        return tuple(len(source) for source in self.reader.sources)


def check_own_views(shared: Sequence[ViewPolicy], own: Mapping[str, Sequence[ViewPolicy]]) -> None:
    """Refuse views of a data set that can't be in one batch with the others'.

    Raises:
        ValueError: another number of views, another size, or recorded views.
    """
    sizes = [policy.size for policy in shared]
    for name, policies in own.items():
        if [policy.size for policy in policies] != sizes:
            raise ValueError(
                f"the views of data set {name!r} have {[p.size for p in policies]} px and "
                f"train_views {sizes}: a batch holds both, so give as many, of the same sizes"
            )
        if any(policy.recorded is not None for policy in [*shared, *policies]):
            raise ValueError(
                f"data set {name!r} has views of its own, and recorded views (and feature caches) "
                "are the same for all data sets: leave recorded out, or the data set's views"
            )


def dataset_facts(url: str) -> dict[str, Any]:
    """``dataset.json`` beside a local shard, as ``multikd shards write`` leaves it."""
    if is_remote(url):
        return {}
    path = Path(url).with_name("dataset.json")
    try:
        facts = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): delete it or write it again") from error
    return facts if isinstance(facts, dict) else {}
