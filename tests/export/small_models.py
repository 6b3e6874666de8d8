"""Small untrained models of many timm families, ready to be exported."""

import timm
import torch

from multikd.export.deployed import DeployedEncoder
from multikd.students import StudentEncoder
from multikd.types import EncoderSpec, Widths

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# family → timm architecture, arguments that keep it small; all at 64 pixels.
FAMILIES = {
    "ViT, class token": ("test_vit", {"img_size": 64}),
    "ViT, registers": ("test_vit4", {"img_size": 64}),
    "ViT, no class token": (
        "test_vit",
        {"img_size": 64, "class_token": False, "global_pool": "avg"},
    ),
    "EVA (rotary positions)": (
        "eva02_tiny_patch14_224",
        {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 2},
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 64,
            "embed_dim": 24,
            "depths": (1, 2, 1, 1),
            "num_heads": (1, 2, 2, 2),
            "window_size": 4,
        },
    ),
    "ConvNeXt": ("test_convnext", {}),
    "ResNet": ("test_resnet", {}),
    "EfficientNet": ("test_efficientnet", {}),
    "MobileNetV3": ("mobilenetv3_small_050", {}),
    "RegNet": ("regnetx_002", {}),
    "MambaOut": ("test_mambaout", {}),
    "NFNet": ("test_nfnet", {}),
}


# Windows and rotary positions are of one size: the batch alone is free.
FIXED_SIZE = ("Swin", "EVA (rotary positions)")


def small_model(family):
    """A model with settled statistics and weights large enough that every layer matters."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **settings).eval()
    _settle(model)
    return model


def _settle(model):
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def small_student(family):
    """The same as a student, made as `fit` makes it."""
    name, settings = FAMILIES[family]
    rest = {k: v for k, v in settings.items() if k not in ("img_size", "global_pool")}
    torch.manual_seed(0)
    student = StudentEncoder(
        name,
        image_size=settings.get("img_size", 64),
        global_pool=settings.get("global_pool"),
        model_args=rest or None,
    )
    _settle(student)
    return student.eval()


def spec_of(model, size=64, name="small"):
    width = int(model.num_features)
    return EncoderSpec(
        name=name,
        widths=Widths(width, width),
        image_size=(size, size),
        patch_size=16,
        mean=MEAN,
        std=STD,
    )


def deployed(family, **settings):
    model = small_model(family)
    size = FAMILIES[family][1].get("img_size", 64)
    return DeployedEncoder(model, spec_of(model, size, family), **settings)
