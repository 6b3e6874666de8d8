"""Images a second of one loader process against the torchvision reference pipeline.

    python tools/bench/loader.py [--images 64] [--json FILE]

One core. JPEGs of 500×375 pixels (crops of scikit-learn's two photographs, quality 90, 4:2:0), the
full UNIC augmentation to 224 px. *Reference*: Pillow, then torchvision's RandomResizedCrop
(bicubic), flip, ColorJitter, grey, GaussianBlur, solarize, ToTensor and Normalize, as published.
*Ours* is the data set itself out of tar shards: reading, decoding, views, and the stacked batch of
uint8. What is left, division and normalisation, is the device's part; it is timed on this core,
too, and added for a second ratio. Beside them the floor: decoding alone, by Pillow and by what ours
uses; and ours by part. The pipelines take turns batch by batch. Their outputs are compared: crops
of the same boxes in grey levels, colours by mean and deviation of each channel over eight epochs.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as tvt
import torchvision.transforms.functional as tvf
from measuring import arguments, finish, in_turns, ratio, shown, summary
from PIL import Image
from torch import Tensor

from multikd.backbones import Normalize
from multikd.data import crops
from multikd.data.crops import Pixels
from multikd.data.dataset import SampleReader, ShardDataset
from multikd.data.decode import decode_pixels
from multikd.data.order import EpochOrder
from multikd.data.sources import ShardSource
from multikd.data.views import DrawKey, Parameters, UnicViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(count: int) -> list[bytes]:
    """JPEGs of 500×375 pixels."""
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(load_sample_image(n)) for n in ("china.jpg", "flower.jpg")]
    files = []
    for number in range(count):
        image = sources[number % 2]
        width = int(rng.integers(320, image.width + 1))
        height = width * 3 // 4
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, max(image.height - height, 0) + 1))
        part = image.crop((left, top, left + width, top + height)).resize((500, 375))
        buffer = io.BytesIO()
        part.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def reference() -> Callable[[bytes], Tensor]:
    """The published augmentation."""
    views = tvt.Compose(
        [
            tvt.RandomResizedCrop(224, interpolation=tvt.InterpolationMode.BICUBIC),
            tvt.RandomHorizontalFlip(),
            tvt.RandomApply([tvt.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            tvt.RandomGrayscale(0.2),
            tvt.RandomApply([tvt.GaussianBlur(9, (0.1, 5.0))], p=0.2),
            tvt.RandomSolarize(128, 0.2),
            tvt.ToTensor(),
            tvt.Normalize(MEAN, STD),
        ]
    )

    def load(data: bytes) -> Tensor:
        return views(Image.open(io.BytesIO(data)).convert("RGB"))  # type: ignore[no-any-return]

    return load


def dataset(files: list[bytes], folder: Path) -> ShardDataset:
    """Ours, over one shard."""
    with tarfile.open(folder / "photos-000000.tar", "w") as tar:
        for number, data in enumerate(files):
            for name, member in ((f"{number:06d}.jpg", data), (f"{number:06d}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    source = ShardSource(str(folder / "photos-000000.tar"))
    order = EpochOrder([source.lengths], seed=0)
    return ShardDataset(SampleReader([source]), order, [UnicViews(224)])


def crops_apart(decoded: list[Pixels], drawn: list[Parameters]) -> dict[str, float]:
    """How far our crops are from Pillow's of the same boxes, in grey levels."""
    apart = []
    for pixels, parameters in zip(decoded, drawn, strict=True):
        box = parameters[:4].tolist()
        height, width = pixels.shape[:2]
        top, left, h, w = (
            round(part * side) for part, side in zip(box, (height, width) * 2, strict=True)
        )
        bicubic = tvt.InterpolationMode.BICUBIC
        theirs = tvf.resized_crop(Image.fromarray(pixels), top, left, h, w, [224, 224], bicubic)
        ours = crops.crop_resize(pixels, box, 224)
        apart.append((ours.int() - tvf.pil_to_tensor(theirs).int()).abs())
    every = torch.stack(apart)
    return {"largest": int(every.max()), "share_not_equal": float((every > 0).double().mean())}


def colours(batches: list[Tensor]) -> dict[str, list[float]]:
    """Mean and deviation of each channel of batches in 0 … 255."""
    values = torch.cat(batches).double().transpose(0, 1).flatten(1)
    return {"mean": values.mean(1).tolist(), "deviation": values.std(1).tolist()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    files = photographs(options.images)
    data, load = dataset(files, folder), reference()
    normalize = Normalize(MEAN, STD)
    epochs = iter(range(10**9))
    policy = UnicViews(224)
    decoded = [decode_pixels(file) for file in files]
    drawn = [
        policy.draw(DrawKey.live(0, 0, p, 0), (d.shape[1], d.shape[0]))
        for p, d in enumerate(decoded)
    ]

    def ours() -> Tensor:
        epoch = next(epochs)
        return data.__getitems__([(epoch, p) for p in range(len(files))]).views[0]

    stacked = ours()
    batches = [ours() for _ in range(8)]
    theirs = [torch.stack([load(file) for file in files]) for _ in batches]
    scale, shift = torch.tensor([STD, MEAN]).view(2, 3, 1, 1) * 255
    compared = {
        "crops_apart": crops_apart(decoded, drawn),
        "colours": {
            "ours": colours(batches),
            "reference": colours([batch * scale + shift for batch in theirs]),
        },
    }
    del batches, theirs

    runs: dict[str, Callable[[], object]] = {
        "reference": lambda: torch.stack([load(file) for file in files]),
        "ours": ours,
        "decoding, Pillow": lambda: [Image.open(io.BytesIO(f)).convert("RGB") for f in files],
        "decoding, ours": lambda: [decode_pixels(file) for file in files],
        "normalisation (the device's part)": lambda: normalize(stacked.float().div_(255.0)),
        "views": lambda: [policy.see(d, p) for d, p in zip(decoded, drawn, strict=True)],
        "of these, crops": lambda: [
            crops.crop_resize(d, p[:4].tolist(), 224) for d, p in zip(decoded, drawn, strict=True)
        ],
    }
    times = in_turns(runs, options.repeats)
    return {
        "images": len(files),
        "bytes": sum(map(len, files)) / len(files),
        **compared,
        "images_per_second": {
            name: summary([len(files) / t for t in values]) for name, values in times.items()
        },
        "ratio": ratio(times["reference"], times["ours"]),
        "ratio_with_normalisation": ratio(
            times["reference"],
            [
                a + b
                for a, b in zip(
                    times["ours"], times["normalisation (the device's part)"], strict=True
                )
            ],
        ),
        "share_of_decoding": ratio(times["decoding, ours"], times["ours"]),
    }


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="in a batch (default: 64)")
    options = arguments(parser, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    rows: list[tuple[str, ...]] = [("images/s on one core", "median [range]")]
    rows += [(name, shown(value)) for name, value in figures["images_per_second"].items()]
    rows.append(("ours to reference", shown(figures["ratio"], "×")))
    both = shown(figures["ratio_with_normalisation"], "×")
    rows.append(("with the device's part on this core", both))
    apart, seen = figures["crops_apart"], figures["colours"]
    rows.append(("crops, largest difference from Pillow's", f"{apart['largest']} levels"))
    for name in ("mean", "deviation"):
        pairs = zip(seen["ours"][name], seen["reference"][name], strict=True)
        shown_pairs = ", ".join(f"{a:.1f} / {b:.1f}" for a, b in pairs)
        rows.append((f"channels, {name}: ours / reference", shown_pairs))
    finish(figures, "loader, 500×375 JPEGs to 224 px", rows, options.json)


if __name__ == "__main__":
    main()
