"""Continue a distillation with the student's layers rounded as they will be deployed."""

from __future__ import annotations

import logging
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from multikd.callbacks.fake_quantized import Prepared, prepare, require_torchao, restore

log = logging.getLogger(__name__)


class QuantizationAware(pl.Callback):
    """Quantisation-aware distillation: what is learned survives int8 (or int4) weights.

    Before training every linear layer of the student becomes torchao's fake-quantised one and every
    plain convolution ours; validation probes then score the rounded student. After training the
    layers are ordinary again. Parameters keep their names, so checkpoints are ordinary ones too:
    they hold the float weights *before* rounding, and the exporter's quantiser does the rounding.

    Use it for a short second `fit` with a small learning rate: same config, ``start`` set to the
    first run's checkpoint.

    Not rounded in training: subclasses of convolution and linear layers (weight standardisation,
    "same" padding), attention's products, norms, and sums between layers, which the static ONNX
    quantiser does round in CNNs. ``torch.compile`` of the student is refused.

    Args:
        bits: of the weights: 8, or 4.
        activations: round the layers' inputs to 8 bits too; for int8 ONNX. Leave it out for
            weight-only torchao exports.
        group_size: inputs that share a scale with 4 bits.
        start: checkpoint of the same config to go on from (student, ladder, normalisers); not read
            where the run itself is resumed.

    Raises:
        ValueError: bits other than 8 and 4, or a checkpoint that does not fit.
        MissingExtraError: the extra ``quantize`` is not installed.
    """

    def __init__(
        self,
        bits: Literal[8, 4] = 8,
        activations: bool = True,
        group_size: int = 32,
        start: str | None = None,
    ) -> None:
        if bits not in (8, 4) or group_size < 1:
            raise ValueError(
                f"bits must be 8 or 4 and group_size at least 1, received {bits} and {group_size}"
            )
        require_torchao()
        self.bits: Literal[8, 4] = bits
        self.activations = activations
        self.group_size = group_size
        self.start = start
        self.prepared: Prepared | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the optimiser is made: load ``start``, change the layers."""
        if stage != "fit" or self.prepared is not None:
            return
        student = getattr(pl_module, "student", None)
        if not isinstance(student, nn.Module):
            raise ValueError(
                f"quantisation-aware training needs a module with a student, received "
                f"{type(pl_module).__name__}"
            )
        if getattr(student, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "quantisation-aware training changes the student's layers: set compile_student "
                "to false"
            )
        if self.start is not None and getattr(trainer, "ckpt_path", None) is None:
            self._load(pl_module, self.start)
        for model in self._models(pl_module):
            self.prepared = prepare(model, self.bits, self.activations, self.group_size)
        if self.prepared is not None:
            log.info(
                "the student trains with %d-bit weights: %d linear layers, %d convolutions; "
                "%d layers of other kinds stay float",
                self.bits,
                self.prepared.linear,
                self.prepared.convolutions,
                self.prepared.left,
            )

    def _load(self, pl_module: pl.LightningModule, path: str) -> None:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            state = dict(checkpoint["state_dict"])
            if isinstance(seed := getattr(pl_module, "seed", None), torch.Tensor):
                state["seed"] = seed  # this run's own draws
            pl_module.load_state_dict(state)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            # torch says what is wrong on the lines after the first.
            line = " ".join(lines[:2])[:300] or type(error).__name__
            raise ValueError(
                f"{path} is no checkpoint of this config to start from ({line}): give one that "
                "`multikd fit` wrote with the same model"
            ) from error

    def _models(self, pl_module: pl.LightningModule) -> list[nn.Module]:
        """The student, and its moving average where one is kept: it is what gets scored."""
        average = getattr(pl_module, "average", None)
        students = [pl_module.student, *([average.student] if average is not None else [])]
        return [student.model for student in students]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ordinary layers again: after training, or after it was broken off."""
        if stage == "fit" and self.prepared is not None:
            for model in self._models(pl_module):
                restore(model)
            self.prepared = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note in the checkpoint what its weights were trained for."""
        checkpoint["quantization_aware"] = {"bits": self.bits, "activations": self.activations}
