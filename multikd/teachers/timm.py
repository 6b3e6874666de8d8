"""Any timm model by name, with weights from the hub or from a file."""

from __future__ import annotations

from multikd.backbones import build_model
from multikd.teachers.encoder import BackboneEncoder


class TimmEncoder(BackboneEncoder):
    """A timm model, named as timm names it: ``vit_base_patch16_224.dino``.

    Args:
        name: ``architecture`` or ``architecture.tag``.
        pretrained: load the tag's weights (from the hub, or its local cache).
        checkpoint: a local weight file in place of the hub's.
        image_size: side in pixels; None takes what the weights were trained at.
        global_pool: what the summary is (``token``, ``avg``, ``map``); None keeps the model's.
        mean: overrides the model's own.
        std: overrides the model's own.
        licence: overrides the one timm records.

    Raises:
        ValueError: unknown name, weights that do not fit or cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        checkpoint: str | None = None,
        image_size: int | None = None,
        global_pool: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
    ) -> None:
        fetched = pretrained and checkpoint is None
        model = build_model(
            name,
            pretrained=fetched,
            checkpoint=checkpoint,
            image_size=image_size,
            global_pool=global_pool,
        )
        super().__init__(
            model,
            name=f"timm:{name}",
            image_size=image_size,
            mean=mean,
            std=std,
            licence=licence,
            source=checkpoint or ("hub" if fetched else "random weights"),
        )
