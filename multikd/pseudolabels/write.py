"""Shards with pseudo-labels: one for each shard of images, atomic, resumable, indexed.

A sample keeps its key (with its folders, which tell samples of one name apart) and its image. Its
true label, where it has one, is left out, so that nothing can learn from it: ``cls`` is the
ensemble's class, ``soft.npy`` its probabilities, and ``pseudo.json`` its confidence and the share
of the ensemble that agrees.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multikd.data.dataset import decode_members
from multikd.data.decode import DEFAULT_MAX_PIXELS, SampleFault, find_image, image_extension
from multikd.data.manifest import MANIFEST, ShardRecord, Skipped, WriteReport, read_manifest
from multikd.data.shard_file import OpenShard, bytes_in_tar
from multikd.data.soft_labels import SOFT, encode_soft
from multikd.data.sources import ShardSource
from multikd.data.views import DrawKey, ViewPolicy
from multikd.files import TEMPORARY_SUFFIX, file_lock, write_atomically
from multikd.pseudolabels.ensemble import Ensemble
from multikd.pseudolabels.tally import Tally, thresholds_with
from multikd.untrusted import MOST_TEXT, parse_json, read_bytes

_LONGEST_KEY = 80  # bytes; a plain tar header holds a name of 100
LOG = ".multikd-pseudolabels.jsonl"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Done:
    """One shard of images that is done; ``record`` is None where no image was kept."""

    shard: int
    record: ShardRecord | None
    tally: Tally


def write_pseudolabels(
    source: ShardSource,
    out: Path,
    ensemble: Ensemble,
    view: ViewPolicy,
    *,
    threshold: float,
    identity: dict[str, Any],
    classes: list[str],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> tuple[WriteReport, Tally]:
    """Label every image of ``source`` and write those with confidence of at least ``threshold``.

    Args:
        source: the images.
        out: folder of the new shards.
        ensemble: of teachers.
        view: how images are shown to it.
        threshold: least confidence, in [0, 1].
        identity: of teachers and settings: another one's shards are not gone on from.
        classes: names, for ``dataset.json``; may be empty.
        batch_size: images at a time.
        device: where the teachers are.
        max_pixels: larger images are left out.
        progress: called with the number of images done.

    Raises:
        ValueError: ``out`` holds other shards, or no image was kept.
    """
    config = {"threshold": threshold, "source digest": source.fingerprint(), **identity}
    out.mkdir(parents=True, exist_ok=True)
    with _sole_writer(out):
        done = _earlier(out, config)
        if len(done) < len(source.urls):
            lines = [json.dumps(config)] + [_line(one) for one in done]
            write_atomically(out / LOG, ("\n".join(lines) + "\n").encode())
        for shard in range(len(done), len(source.urls)):
            work = _Shard(source, shard, ensemble, view, batch_size, device, max_pixels)
            done.append(work.write(out, threshold, progress))
            _append(out / LOG, done[-1])
        tally = sum((one.tally for one in done), Tally(thresholds_with(threshold)))
        records = [one.record for one in done if one.record is not None]
        if not tally.images:
            raise ValueError(
                f"none of the {tally.unreadable} images can be read: look at them with `multikd "
                "shards inspect`"
            )
        if not records:
            raise ValueError(
                f"no image reaches a confidence of {threshold} (of {tally.images}): lower "
                "--threshold"
            )
        report = WriteReport(
            out=str(out),
            source=", ".join(source.name(s) for s in range(len(source.urls)))[:2000],
            shards=records,
            classes=classes,
            counts=tally.classes,
            unlabelled=0,
            notes=[f"pseudo-labels of {', '.join(ensemble.weights)}: not true labels"],
            config=config,
        )
        content = {**report.manifest(), "pseudolabels": tally.to_json()}
        log = [json.loads(_line(one)) for one in done]
        text = json.dumps({**content, "log": log}, indent=1, ensure_ascii=False)
        write_atomically(out / MANIFEST, text.encode("utf-8"))
        (out / LOG).unlink(missing_ok=True)
    return report, tally


class _Shard:
    """One shard of images on its way."""

    def __init__(
        self,
        source: ShardSource,
        shard: int,
        ensemble: Ensemble,
        view: ViewPolicy,
        batch_size: int,
        device: torch.device | str,
        max_pixels: int,
    ) -> None:
        self.source, self.shard, self.ensemble, self.view = source, shard, ensemble, view
        self.batch_size, self.device, self.max_pixels = batch_size, device, max_pixels
        self.skipped: list[Skipped] = []

    def write(self, out: Path, threshold: float, progress: Progress | None) -> Done:
        """Label it; the new shard is there in full, or (where nothing was kept) not at all."""
        chosen = thresholds_with(threshold)
        tally = Tally(chosen)
        opened = OpenShard(out, self.shard, 0)
        try:
            for members, images, truth in self._batches():
                shown = torch.stack(images).to(self.device).to(torch.float32) / 255
                mean, agreement = self.ensemble(shown)
                rows = mean.cpu().numpy()
                tally += Tally.of(rows, np.array(truth), chosen, threshold)
                for sample, row, agree in zip(members, rows, agreement.tolist(), strict=True):
                    if row.max() >= threshold:
                        added = _members(*sample, row, agree)
                        opened.add(added, bytes_in_tar(added))
                if progress is not None:
                    progress(len(images))
            tally.unreadable = len(self.skipped)
            opened.skipped = self.skipped
            record = opened.finish(0) if opened.samples else None
        finally:
            opened.discard()
        return Done(self.shard, record, tally)

    def _batches(self) -> Iterator[tuple[list[tuple[str, str, bytes]], list[Tensor], list[int]]]:
        members: list[tuple[str, str, bytes]] = []
        images: list[Tensor] = []
        truth: list[int] = []
        for sample in range(int(self.source.lengths[self.shard])):
            key = self.source.key(self.shard, sample)
            try:
                found = self.source.read_members(self.shard, sample)
                decoded = decode_members(found, key, self.max_pixels)
            except SampleFault as fault:
                self.skipped.append(Skipped(sample, key, fault.cause, fault.detail))
                continue
            drawn = self.view.draw(DrawKey.live(0, 0, sample, 0), decoded.size)
            images.append(self.view.see(decoded.pixels, drawn))
            members.append((key, image_extension(found) or "img", find_image(found)))
            truth.append(decoded.label)
            if len(images) == self.batch_size:
                yield members, images, truth
                members, images, truth = [], [], []
        if images:
            yield members, images, truth


def _members(
    key: str, extension: str, data: bytes, row: np.ndarray[Any, Any], agree: float
) -> list[tuple[str, bytes]]:
    about = {"confidence": float(row.max()), "agreement": agree}
    if len(key.encode()) > _LONGEST_KEY:
        key = hashlib.sha256(key.encode()).hexdigest()[:32]
    return [
        (f"{key}.{extension.rpartition('.')[2]}", data),
        (f"{key}.cls", str(int(row.argmax())).encode()),
        (f"{key}.pseudo.json", json.dumps(about).encode()),
        (f"{key}.{SOFT}", encode_soft(row)),
    ]


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    try:
        with file_lock(folder / ".multikd-write.lock", wait=False):
            for path in folder.glob("*" + TEMPORARY_SUFFIX):
                path.unlink(missing_ok=True)
            yield
    except BlockingIOError as error:
        raise ValueError(f"another process is writing shards into {folder}: wait for it") from error


def _line(done: Done) -> str:
    record = None if done.record is None else asdict(done.record)
    return json.dumps({"shard": done.shard, "record": record, "tally": done.tally.to_json()})


def _append(path: Path, done: Done) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(done) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _earlier(out: Path, config: dict[str, Any]) -> list[Done]:
    """Shards that an earlier run with the same settings finished.

    Raises:
        ValueError: ``out`` holds shards of other settings, or others altogether.
    """
    manifest = read_manifest(out)
    entries: list[Any]
    if manifest is not None and "pseudolabels" in manifest:
        known, entries = manifest.get("config"), manifest.get("log") or []
    else:
        try:
            lines = read_bytes(out / LOG, MOST_TEXT).decode("utf-8").splitlines()
            known, entries = parse_json(lines[0], out / LOG), _parsed(lines[1:], out)
        except (OSError, ValueError, IndexError):
            if any(out.glob("*.tar")):
                raise ValueError(
                    f"{out} holds .tar files that are no pseudo-labels of ours: name another --out"
                ) from None
            return []
    if known != config and not any(out.glob("*.tar")):
        return []  # it ended before it kept an image: nothing to mix with
    if known != config:
        names = {*config, *known} if isinstance(known, dict) else set(config)
        other = sorted(
            n for n in names if not isinstance(known, dict) or known.get(n) != config.get(n)
        )
        raise ValueError(
            f"{out} holds pseudo-labels of another run (other {', '.join(other)}): name another "
            "--out, or remove that folder"
        )
    return _whole(entries, out)


def _parsed(lines: list[str], out: Path) -> list[Any]:
    found = []
    for line in lines:
        try:
            found.append(parse_json(line, out / LOG))
        except ValueError:  # the last one, if a kill cut it
            break
    return found


def _whole(entries: list[Any], out: Path) -> list[Done]:
    """The entries up to the first whose shard is not there in full."""
    found: list[Done] = []
    for entry in entries:
        try:
            record = None if entry["record"] is None else ShardRecord.from_dict(entry["record"])
            if record is not None and (out / record.name).stat().st_size != record.bytes:
                break
            done = Done(int(entry["shard"]), record, Tally.from_json(entry["tally"]))
        except (OSError, TypeError, KeyError, ValueError):
            break
        if done.shard != len(found):
            break
        found.append(done)
    return found
