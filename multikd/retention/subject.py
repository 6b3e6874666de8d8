"""One encoder before one data set, with its features on disk: what a task scores."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.task import EncodedSplit, EvalSplit, NotApplicable
from multikd.retention.datasets import EvalDataset
from multikd.retention.digest import combined, file_digest
from multikd.retention.encoders import Column
from multikd.retention.extract import ExtractOptions, extract, plan, store_of
from multikd.retention.store import FeatureStore, RowFault
from multikd.types import EncoderSpec, Grid, TokenFeatures, TokenType

log = logging.getLogger(__name__)


class EncoderSubject:
    """See ``multikd.evaluation.task.Subject``.

    Images that could not be read are left out of ``splits`` and of all features, as soon as the
    features of their split are there; so they count for nobody, and rows agree everywhere.

    Args:
        column: the encoder.
        data: the data set.
        options: where features are kept and how they are computed.
        progress: show a bar where something is extracted after all.
    """

    def __init__(
        self, column: Column, data: EvalDataset, options: ExtractOptions, progress: bool = False
    ) -> None:
        self.column = column
        self.data = data
        self.options = options
        self.progress = progress
        self.name = column.name
        # What it sees here: a task that encodes images itself takes their size from this.
        self.spec: EncoderSpec = dataclasses.replace(column.spec, image_size=size_for(column, data))
        self.head = column.head
        self.splits: Mapping[str, EvalSplit] = dict(data.splits)
        self._checked: set[Path] = set()  # stores whose checksums were compared

    @property
    def fingerprint(self) -> str:
        """Of weights and preprocessing."""
        return combined(encoder=self.column.fingerprint, crop=self.data.spec.crop)

    @property
    def size(self) -> Grid:
        """At which this encoder sees this data set."""
        return size_for(self.column, self.data)

    def features(
        self, split: str, tokens: Sequence[TokenType] = ("summary",), size: Grid | None = None
    ) -> EncodedSplit:
        """From disk; what is not there yet is extracted, for all tokens at once."""
        size = size or self.size
        if split not in self.data.splits:
            raise ValueError(
                f"the data set {self.data.name!r} has no {split} split: give it in the task file"
            )
        stores = self._stores(split, tokens, size)
        for store in stores.values():
            if store.complete and store.folder not in self._checked:
                store.damaged()  # what is, is missing from here on
                self._checked.add(store.folder)
        works = plan(
            [(self.column, self.data, split, token, size) for token in tokens], self.options
        )
        if works:
            single = _alone(self.options)
            extract(works, single, self.progress)
            stores = self._stores(split, tokens, size)
        values = {token: store.read(check=False) for token, store in stores.items()}
        faults = next(iter(stores.values())).faults()
        rows = self._leave_out(split, faults)
        keep = np.ones(len(self.data.splits[split]), dtype=bool)
        keep[rows] = False
        summary: Tensor | None = None
        patches: Tensor | npt.NDArray[np.float16] | None = None
        if "summary" in values:
            kept = values["summary"] if not rows else values["summary"][keep]
            summary = torch.from_numpy(np.array(kept, dtype=np.float32))
        if "patches" in values:
            tokens_kept = values["patches"] if not rows else values["patches"][keep]
            patches = tokens_kept
            if tokens_kept.dtype != np.float16:
                patches = torch.from_numpy(np.array(tokens_kept))
        grid = stores["patches"].grid if "patches" in stores else None
        return EncodedSplit(summary, patches, grid, [fault.key for fault in faults])

    def note_faults(self, split: str, token: TokenType, size: Grid) -> list[str]:
        """Keys of the images that could not be read when this was extracted; left out from here."""
        images = self.data.splits[split]
        faults = store_of(self.column, images, size, token, self.options).faults()
        self._leave_out(split, faults)
        return [fault.key for fault in faults]

    def _leave_out(self, split: str, faults: Sequence[RowFault]) -> list[int]:
        """Rows of these images; from here on the split is without them."""
        rows = sorted({fault.row for fault in faults})
        if rows:
            self.splits = {**self.splits, split: self.data.splits[split].without(rows)}
        return rows

    def _stores(
        self, split: str, tokens: Sequence[TokenType], size: Grid
    ) -> dict[TokenType, FeatureStore]:
        images = self.data.splits[split]
        return {token: store_of(self.column, images, size, token, self.options) for token in tokens}

    def encode(self, images: Tensor) -> TokenFeatures:
        """Float images in [0, 1] → features on the device of the network; differentiable."""
        weights = next(self.column.network.parameters(), images)
        found: TokenFeatures = self.column.network(images.to(weights.device))[self.column.member]
        return found

    @property
    def has_texts(self) -> bool:
        """Whether a text tower belongs to this encoder or head."""
        return self.column.text is not None

    def text_weights(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit rows ``(K, D)`` of the text tower; kept on disk.

        Raises:
            NotApplicable: this encoder has no text tower.
            ValueError: the tower can't be had here.
        """
        text = self.column.text
        if text is None:
            raise NotApplicable(
                f"{self.name} has no text tower: zero-shot needs an open_clip encoder, or a "
                "student's head for an open_clip teacher"
            )
        weights = "" if text.checkpoint is None else file_digest(Path(text.checkpoint))
        key = combined(
            encoder=text.encoder,
            weights=weights,
            classes=tuple(classes),
            templates=tuple(templates),
        )
        from multikd.retention.texts import cached_weights

        return cached_weights(self.options.cache / "texts", key, text, classes, templates)


def size_for(column: Column, data: EvalDataset) -> Grid:
    """The data set's size where it states one, else the encoder's own."""
    size = data.spec.size
    return column.spec.image_size if size is None else (size, size)


def _alone(options: ExtractOptions) -> ExtractOptions:
    """The same on one device: for what rank 0 finds missing while the others have gone."""
    return dataclasses.replace(options, devices=1)
