"""Data sets by name: how a configuration names them, and what they are once opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multikd.data.dataset import SampleReader
from multikd.data.remote import is_remote
from multikd.untrusted import read_json


@dataclass
class DatasetSpec:
    """One data set of a mixture.

    Attributes:
        urls: shards: path, folder, glob, brace range, http(s) address, or a list of these.
        weight: share of an epoch's samples that come from it, relative to the other data sets'.
    """

    urls: str | list[str]
    weight: float = 1.0


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
