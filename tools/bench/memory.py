"""What a step keeps and holds: ladder by batch, gradient checkpointing of the student.

    python tools/bench/memory.py [--json FILE]

Bytes that the forward pass keeps for the backward pass and the peak of torch's allocator, in a step
of a ViT-S/16 student with UNIC's ladder for two teachers (bf16 autocast, 224 px, batch 4): fused
and unfused ladder, with and without gradient checkpointing per block, beside what `multikd plan`
counts from shapes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measuring import arguments, finish, peak_bytes, saved_bytes
from step import ARCHITECTURE, autocast, batch_of, build

from multikd.backbones import skeleton
from multikd.modules import DistillationModule
from multikd.plan.counts import count_step
from multikd.students import StudentEncoder

VARIANTS = {
    "naive ladder": (False, False),
    "fused ladder": (True, False),
    "fused, checkpointed blocks": (True, True),
}


def measure(batch: int, fused: bool, checkpointed: bool) -> dict[str, float]:
    """Bytes of one variant."""
    module: DistillationModule = build(2, torch.bfloat16)
    module.ladder.fused = fused
    if checkpointed:
        state = module.student.state_dict()
        module.student = StudentEncoder(ARCHITECTURE, image_size=224, grad_checkpointing=True)
        module.student.load_state_dict(state)
    module.train()
    data = batch_of(batch)
    images = data.views[0].float() / 255
    targets = module.targets(data, images, 0, module.teacher_names)
    data.cached = targets

    def forward() -> object:
        with autocast(torch.bfloat16):
            return module.step(data, 0, 0, training=True)[0]

    def whole() -> None:
        total = forward()
        total.backward()  # type: ignore[attr-defined]
        module.zero_grad()

    parameters = [*module.parameters(), *(t for f in targets.values() for t in _tensors(f))]
    return {"kept": saved_bytes(forward, parameters), "peak": peak_bytes(whole)}


def _tensors(features: Any) -> list[torch.Tensor]:
    return [t for t in (features.summary, features.patches) if t is not None]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    options = arguments(parser)
    figures: dict[str, Any] = {name: measure(options.batch, *how) for name, how in VARIANTS.items()}
    with skeleton(), torch.device("meta"):
        counts = count_step(build(2, torch.bfloat16), (224, 224))
    figures["planned"] = {"activations": 0.75 * options.batch * counts.kept}
    rows: list[tuple[str, ...]] = [("MB", "kept for backward", "peak")]
    for name in VARIANTS:
        found = figures[name]
        rows.append((name, f"{found['kept'] / 1e6:.0f}", f"{found['peak'] / 1e6:.0f}"))
    rows.append(("multikd plan", f"{figures['planned']['activations'] / 1e6:.0f}", ""))
    finish(figures, "memory of a step", rows, options.json)


if __name__ == "__main__":
    main()
