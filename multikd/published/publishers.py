"""Who published which student, under which licence, and where its layout was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["unic", "dune", "theia", "radio", "eupe"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Publisher:
    """Of one kind of released file.

    Attributes:
        repository: on GitHub.
        commit: of it, whose files were read; no released file was at hand.
        paper: on arXiv.
        licence: of the weights.
        licence_file: where that was read.
        layout: what a file of this kind looks like, for a message.
        sources: the repository's files that say so.
    """

    repository: str
    commit: str
    paper: str
    licence: str
    licence_file: str
    layout: str
    sources: str

    @property
    def link(self) -> str:
        """The repository at that commit."""
        return f"https://github.com/{self.repository}/tree/{self.commit}"


PUBLISHERS: dict[Kind, Publisher] = {
    "unic": Publisher(
        repository="naver/unic",
        commit="02269db",
        paper="2408.05088",
        licence="cc-by-nc-sa-4.0",
        licence_file="LICENSE_checkpoint",
        layout="'model' with encoder.blocks.0.N.… (module. in front), and 'args'",
        sources="main_unic.py, modeling/unic.py, dinov2/models/vision_transformer.py",
    ),
    "dune": Publisher(
        repository="naver/dune",
        commit="afad549",
        paper="2503.14405",
        licence="NLE DUNE Non-Commercial License",
        licence_file="Project NLE DUNE LICENSE.txt",
        layout="'model' with encoder.blocks.0.N.…, encoder.register_tokens, and 'args'",
        sources="main_dune.py, model/dune.py, model/options.py, "
        "model/encoder/vision_transformer.py",
    ),
    "theia": Publisher(
        repository="bdaiinstitute/theia",
        commit="59d0448",
        paper="2407.20179",
        licence="The AI Institute License, non-commercial research",
        licence_file="LICENSE",
        layout="backbone.model.embeddings.…, backbone.model.encoder.layer.N.… of transformers' ViT",
        sources="src/theia/models/rvfm.py, src/theia/models/backbones.py",
    ),
    "radio": Publisher(
        repository="NVlabs/RADIO",
        commit="c0f3701",
        paper="2312.06709",
        licence="NVIDIA Source Code License-NC",
        licence_file="LICENSE, README.md (Licensing)",
        layout="'state_dict' with base_model.patch_generator.…, base_model.blocks.N.…, and 'args'",
        sources="hubconf.py, radio/radio_model.py, radio/vit_patch_generator.py, "
        "radio/cls_token.py, radio/enable_cpe_support.py, radio/extra_timm_models.py",
    ),
    "eupe": Publisher(
        repository="facebookresearch/EUPE",
        commit="f6cdf04",
        paper="2603.22387",
        licence="FAIR Noncommercial Research License",
        licence_file="LICENSE.md",
        layout="cls_token, storage_tokens, rope_embed.periods, blocks.N.… of a DINOv3 ViT",
        sources="eupe/hub/backbones.py, eupe/models/vision_transformer.py, "
        "eupe/layers/attention.py, eupe/layers/rope_position_encoding.py",
    ),
}

C_RADIO_LICENCE = "NVIDIA Open Model License"
"""Of the C-RADIO family (NVlabs/RADIO, README.md, Licensing)."""


def licence_of(kind: Kind, file_name: str) -> str:
    """The licence of a released file; RADIO and C-RADIO differ by their files' names alone."""
    name = file_name.lower().replace("_", "-")
    if kind == "radio" and name.startswith(("c-radio", "cradio")):
        return C_RADIO_LICENCE
    return PUBLISHERS[kind].licence
