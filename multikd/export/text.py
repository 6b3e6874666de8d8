"""The text tower of an open_clip teacher, for a student's head that answers in its space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multikd.backbones import read_state_dict
from multikd.errors import unknown_name

SCHEME = "open_clip:"
TEMPLATES = ("a photo of a {}.",)


class TextTower:
    """Texts → L2-normalised embeddings ``(K, D)`` float32 in a CLIP model's joint space.

    Args:
        encoder: the teacher as the registry names it: ``open_clip:ARCHITECTURE/TAG``.
        checkpoint: a local weight file (the whole CLIP model) in place of the tag's.
        device: where to run.

    Raises:
        ValueError: not an open_clip teacher, an unknown architecture, or weights that can't be
            fetched or do not fit.
    """

    def __init__(
        self, encoder: str, checkpoint: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if not encoder.startswith(SCHEME):
            raise ValueError(
                f"{encoder or 'this teacher'} has no text tower: zero-shot classification needs "
                "the head of an open_clip teacher"
            )
        import open_clip

        self.encoder = encoder
        self.device = torch.device(device)
        architecture = encoder.removeprefix(SCHEME)
        tag = ""
        if not architecture.startswith(("hf-hub:", "local-dir:")):
            architecture, _, tag = architecture.partition("/")
        model = _build(open_clip, architecture, tag, checkpoint)
        # The images go through the student: the image tower is not needed.
        if isinstance(getattr(model, "visual", None), nn.Module):
            del model.visual
        self._model: Any = model.eval().requires_grad_(False).to(self.device)
        self._tokenize: Any = open_clip.get_tokenizer(architecture)
        self.scale = float(model.logit_scale.exp())
        bias = getattr(model, "logit_bias", None)
        self.bias = 0.0 if bias is None else float(bias)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``(K, D)`` of K texts, L2-normalised."""
        if not texts:
            raise ValueError("there is no text to encode: give at least one")
        parts = [
            self._model.encode_text(self._tokenize(list(texts[i : i + 256])).to(self.device))
            for i in range(0, len(texts), 256)
        ]
        return nn.functional.normalize(torch.cat(parts).float(), dim=-1)

    def class_weights(self, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """One embedding a class ``(K, D)``: the normalised mean over prompt templates.

        As Radford et al. 2021 (arXiv 2103.00020, section 3.1.4) ensemble prompts.

        Raises:
            ValueError: no class, or a template without ``{}``.
        """
        wrong = [template for template in templates if "{}" not in template]
        if wrong or not templates:
            raise ValueError(
                "a prompt template needs {} where the class name goes, received "
                f"{wrong[0] if wrong else 'none'!r}"
            )
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        embeddings = self.encode(prompts).view(len(classes), len(templates), -1)
        return nn.functional.normalize(embeddings.mean(dim=1), dim=-1)


def _build(open_clip: Any, architecture: str, tag: str, checkpoint: str | None) -> Any:
    by_schema = ":" in architecture
    if not by_schema and architecture not in open_clip.list_models():
        raise unknown_name("open_clip architecture", architecture, open_clip.list_models())
    if not by_schema and not tag and checkpoint is None:
        raise ValueError(
            f"the weights of open_clip:{architecture} were a local file: give checkpoint=PATH of "
            "that whole CLIP model for its text tower"
        )
    config = None if by_schema else open_clip.get_model_config(architecture)
    # The tag's activation wins: the same architecture was trained with both GELUs.
    if tag:
        config = open_clip.get_pretrained_cfg(architecture, tag)
    quick = bool((config or {}).get("quick_gelu", False))
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=tag if tag and checkpoint is None else None,
            load_weights=checkpoint is None,
            force_quick_gelu=quick,
            pretrained_image=False,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the text tower of open_clip:{architecture} could not be built or fetched ({reason}): "
            "without a connection give checkpoint=PATH of the whole CLIP model"
        ) from error
    if checkpoint is not None:
        tensors = read_state_dict(checkpoint)
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        own = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
        try:
            missing, extra = model.load_state_dict(own, strict=False)
            wrong = [key for key in missing if not key.startswith("visual.")] + list(extra)
        except RuntimeError as error:  # other shapes
            wrong = [str(error).splitlines()[-1].strip().partition(":")[0]]
        if wrong:
            raise ValueError(
                f"{Path(checkpoint).name} is not the whole CLIP model open_clip:{architecture} "
                f"({wrong[0]!r} does not fit): give the file with its text tower"
            )
    return model
