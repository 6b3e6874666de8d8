from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from multikd.backbones import skeleton
from multikd.students import StudentEncoder
from multikd.types import Widths

# name → (size, rungs, grid of the last rung, widths of the last rung, class token is the summary)
FAMILIES = {
    "vit_tiny_patch16_224": (64, 12, (4, 4), Widths(192, 192), True),
    "vit_small_patch14_reg4_dinov2": (56, 12, (4, 4), Widths(384, 384), True),
    "vit_wee_patch16_reg1_gap_256": (64, 14, (4, 4), Widths(256, 256), False),
    "swin_tiny_patch4_window7_224": (64, 4, (2, 2), Widths(768, 768), False),
    "convnext_atto": (64, 4, (2, 2), Widths(320, 320), False),
    "efficientnet_lite0": (64, 5, (2, 2), Widths(1280, 1280), False),
    "resnet10t": (64, 5, (2, 2), Widths(512, 512), False),
    "mobilenetv3_small_050": (64, 5, (2, 2), Widths(1024, 288), False),
}
SIX = tuple(FAMILIES)[:7]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small operations on a shared machine: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def student_of(name: str, num_classes: int = 0) -> StudentEncoder:
    torch.manual_seed(0)
    size = FAMILIES[name][0]
    return StudentEncoder(name, image_size=size, num_classes=num_classes)


def images_for(name: str, batch: int = 2) -> Tensor:
    size = FAMILIES[name][0]
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain_model(name: str, size: int, num_classes: int = 0) -> nn.Module:
    """timm's own, built without anything of ours."""
    try:
        return timm.create_model(name, num_classes=num_classes, img_size=size)
    except TypeError:
        return timm.create_model(name, num_classes=num_classes)


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_features_are_bit_for_bit_those_of_the_exported_model(self, name: str) -> None:
        student = student_of(name).eval()
        images = images_for(name)
        plain = plain_model(name, FAMILIES[name][0])
        plain.load_state_dict(student.encoder_state_dict(), strict=True)
        mean = torch.tensor(plain.pretrained_cfg["mean"]).view(1, 3, 1, 1)
        std = torch.tensor(plain.pretrained_cfg["std"]).view(1, 3, 1, 1)
        with torch.no_grad():
            expected = plain.eval()((images - mean) / std)
            one_pass = student(images).features
            alone = student.features(images)
            exported = student.export_model()((images - mean) / std)
        for summary in (one_pass.summary, alone.summary, exported):
            assert torch.equal(summary, expected)
        assert torch.equal(one_pass.patches, alone.patches)

    def test_shapes_are_as_announced(self, name: str) -> None:
        student = student_of(name).eval()
        size, count, grid, last, class_token = FAMILIES[name]
        with torch.no_grad():
            output = student(images_for(name))
        assert len(output.rungs) == count == len(student.widths)
        assert tuple(rung.widths for rung in output.rungs) == student.widths
        assert tuple(rung.grid for rung in output.rungs) == student.grids((size, size))
        assert output.features.widths == student.feature_widths == last == student.widths[-1]
        assert output.rungs[-1].grid == output.features.grid == grid
        assert student.plan.class_summary is class_token
        stride = student.spec.patch_size
        assert (size // stride, size // stride) == grid

    def test_grids_of_another_size(self, name: str) -> None:
        student = student_of(name)
        size = FAMILIES[name][0] * 2
        try:
            announced = student.grids((size, size))
        except ValueError:
            assert student.spec.fixed_size
            return
        with torch.no_grad():
            output = student.eval()(torch.rand(1, 3, size, size))
        assert tuple(rung.grid for rung in output.rungs) == announced

    def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one_could(
        self, name: str
    ) -> None:
        student = copy.deepcopy(student_of(name)).train()
        before = {n for n, p in student.named_parameters() if p.requires_grad}
        frozen = student.freeze_unreached(uses_features=False)
        rungs = student(images_for(name)).rungs
        torch.stack([r.summary.sum() + r.patches.sum() for r in rungs]).sum().backward()
        with_gradient = {n for n, p in student.named_parameters() if p.grad is not None}
        assert with_gradient == {n for n, p in student.named_parameters() if p.requires_grad}
        assert with_gradient == before - set(frozen)
        # Only norms may stay at their start: a matrix there would make the export noise.
        assert all(student.get_parameter(n).ndim == 1 for n in frozen)

    def test_nothing_is_frozen_when_the_features_are_used(self, name: str) -> None:
        student = copy.deepcopy(student_of(name))
        assert student.freeze_unreached(uses_features=True) == []

    def test_builds_on_the_meta_device(self, name: str) -> None:
        with skeleton(), torch.device("meta"):
            student = StudentEncoder(name, image_size=FAMILIES[name][0], pretrained=True)
        assert all(p.is_meta for p in student.parameters())
        assert student.widths == student_of(name).widths


@pytest.mark.parametrize("name", SIX)
def test_classifier_gives_timm_s_logits(name: str) -> None:
    student = StudentEncoder(name, image_size=FAMILIES[name][0], num_classes=5).eval()
    images = images_for(name)
    with torch.no_grad():
        output = student(images)
        expected = student.export_model(classifier=True)(student.normalize(images))
        bare = student.export_model()(student.normalize(images))
    assert torch.equal(output.features.logits, expected)
    assert torch.equal(output.features.summary, bare)
    assert output.rungs[-1].logits is None


class TestRungs:
    @pytest.mark.parametrize(
        ("name", "prefix"), [("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5)]
    )
    def test_vit_rungs_are_block_outputs_before_the_final_norm(
        self, name: str, prefix: int
    ) -> None:
        student = student_of(name).eval()
        images = images_for(name)
        outputs: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda m, i, o: outputs.append(o))
            for block in student.model.blocks  # type: ignore[union-attr]
        ]
        with torch.no_grad():
            rungs = student(images).rungs
        for hook in hooks:
            hook.remove()
        assert len(outputs) == 12  # one pass
        for rung, tokens in zip(rungs, outputs, strict=True):
            assert torch.equal(rung.summary, tokens[:, 0])
            assert torch.equal(rung.patches, tokens[:, prefix:])

    def test_registers_are_neither_patches_nor_summary(self) -> None:
        name = "vit_wee_patch16_reg1_gap_256"  # its only prefix token is a register
        student = student_of(name).eval()
        with torch.no_grad():
            rung = student(images_for(name)).rungs[3]
        assert rung.patches.shape[1] == 16
        torch.testing.assert_close(rung.summary, rung.patches.mean(1))

    def test_last_rung_of_a_cnn_is_its_final_features(self) -> None:
        student = student_of("mobilenetv3_small_050").eval()
        with torch.no_grad():
            output = student(images_for("mobilenetv3_small_050"))
        assert torch.equal(output.rungs[-1].summary, output.features.summary)
        assert torch.equal(output.rungs[-1].patches, output.features.patches)

    def test_attention_pooling_is_trained(self) -> None:
        student = StudentEncoder("vit_base_patch16_siglip_224", image_size=32, rungs="last")
        assert student.plan.last_is_final
        assert student.freeze_unreached(uses_features=False) == []

    def test_class_attention_is_trained(self) -> None:
        student = StudentEncoder("cait_xxs24_224", image_size=32, rungs=[3, -1])
        assert student.freeze_unreached(uses_features=False) == []

    def test_naflex_and_xcit_are_students(self) -> None:
        for name in ("naflexvit_base_patch16_gap", "xcit_nano_12_p16_224"):
            with skeleton(), torch.device("meta"):
                student = StudentEncoder(name, image_size=64, rungs=[-1])
            assert student.grids((64, 64)) == ((4, 4),)

    def test_rungs_without_the_last_warn_of_untrained_matrices(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        student = StudentEncoder("resnet10t", image_size=64, rungs=[1, 2])
        with caplog.at_level(logging.WARNING):
            frozen = student.freeze_unreached(uses_features=False)
        assert any(name.startswith("model.layer4.") for name in frozen)
        assert "stay at their random start" in caplog.text

    def test_reach_of_single_token_types(self) -> None:
        student = StudentEncoder("mobilenetv3_small_050", image_size=64, rungs="last")
        frozen = student.freeze_unreached(uses_features=False, tokens=("patches",))
        assert "model.conv_head.weight" in frozen

    def test_published_unic_leaves_the_final_norm(self) -> None:
        student = StudentEncoder("vit_tiny_patch16_224", image_size=32, rungs=[0, 5, 11])
        frozen = student.freeze_unreached(uses_features=False)
        assert frozen == ["model.norm.weight", "model.norm.bias"]


class TestSettings:
    def test_gradient_checkpointing_changes_nothing_but_memory(self) -> None:
        plain = copy.deepcopy(student_of("vit_tiny_patch16_224")).train()
        twin = copy.deepcopy(plain)
        twin.model.set_grad_checkpointing(True)  # type: ignore[operator]
        gradients = []
        for student in (plain, twin):
            student.zero_grad()
            student(images_for("vit_tiny_patch16_224")).features.summary.pow(2).sum().backward()
            gradients.append(student.model.blocks[0].attn.qkv.weight.grad)  # type: ignore[index, union-attr]
        assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
        built = StudentEncoder("resnet10t", image_size=64, grad_checkpointing=True)
        assert built.model.grad_checkpointing

    def test_gradient_checkpointing_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(timm.models.resnet.ResNet, "set_grad_checkpointing")
        with pytest.raises(ValueError, match="test_resnet has no gradient checkpointing"):
            StudentEncoder("test_resnet", image_size=64, grad_checkpointing=True)

    def test_drop_path_is_what_it_says_even_where_timm_has_another_default(self) -> None:
        rates = {
            module.drop_prob
            for module in student_of("swin_tiny_patch4_window7_224").modules()
            if type(module).__name__ == "DropPath"
        }
        assert rates <= {0.0}

    def test_drop_path(self) -> None:
        student = StudentEncoder("test_vit", image_size=32, drop_path=0.3).train()
        images = torch.rand(8, 3, 32, 32)
        first, second = (student(images).features.summary for _ in range(2))
        assert not torch.equal(first, second)
        student.eval()
        assert torch.equal(student(images).features.summary, student(images).features.summary)

    def test_patch_size(self) -> None:
        student = StudentEncoder("test_vit", image_size=32, patch_size=8)
        assert student.spec.patch_size == 8
        assert student.grids((32, 32))[-1] == (4, 4)
        assert student.grids((64, 32))[-1] == (8, 4)

    def test_size_and_patch_that_do_not_agree(self) -> None:
        with pytest.raises(ValueError, match="cannot take images of 60×60"):
            StudentEncoder("test_vit", image_size=60)

    def test_mean_and_std_override_and_are_applied_once(self) -> None:
        torch.manual_seed(0)
        student = StudentEncoder(
            "resnet10t", image_size=64, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
        ).eval()
        seen: list[Tensor] = []
        student.model.conv1.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda m, inputs: seen.append(inputs[0])
        )
        student(torch.full((1, 3, 64, 64), 0.5))
        expected = torch.tensor([0.4 / 0.5, 0.3 / 0.6, 0.2 / 0.7])
        torch.testing.assert_close(seen[0][0, :, 0, 0], expected)
        config = student.export_model().pretrained_cfg
        assert config["mean"] == (0.1, 0.2, 0.3)  # type: ignore[index]
        assert config["input_size"] == (3, 64, 64)  # type: ignore[index]

    def test_bf16_true(self) -> None:
        student = copy.deepcopy(student_of("resnet10t")).bfloat16().eval()
        assert student(images_for("resnet10t")).features.summary.dtype == torch.bfloat16
        assert student.normalize.mean.dtype == torch.float32

    def test_channels_last_changes_the_last_bits_at_most(self) -> None:
        plain = student_of("resnet10t").eval()
        fast = StudentEncoder("resnet10t", image_size=64, channels_last=True).eval()
        fast.load_state_dict(plain.state_dict())
        images = images_for("resnet10t")
        torch.testing.assert_close(
            fast(images).features.summary, plain(images).features.summary, atol=1e-4, rtol=1e-4
        )
        exported = fast.export_model()
        assert torch.equal(exported(plain.normalize(images)), plain(images).features.summary)

    def test_uint8_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match="divide uint8 by 255"):
            student_of("resnet10t")(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    def test_global_pool_decides_the_summary(self) -> None:
        token = StudentEncoder("test_vit", image_size=32)
        mean = StudentEncoder("test_vit", image_size=32, global_pool="avg")
        assert token.plan.class_summary
        assert not mean.plan.class_summary

    def test_negative_classes(self) -> None:
        with pytest.raises(ValueError, match="0 or more"):
            StudentEncoder("resnet10t", num_classes=-1)


class TestCheckpoint:
    def test_starts_from_a_file(self, tmp_path: Path) -> None:
        source = student_of("resnet10t")
        path = tmp_path / "student.pth"
        torch.save(source.state_dict(), path)  # with our "model." prefix
        loaded = StudentEncoder("resnet10t", image_size=64, checkpoint=str(path), num_classes=3)
        key = "layer4.0.conv1.weight"
        assert torch.equal(loaded.model.state_dict()[key], source.model.state_dict()[key])
        assert loaded.spec.source == str(path)

    def test_one_that_does_not_fit_names_the_tensor(self, tmp_path: Path) -> None:
        path = tmp_path / "student.pth"
        torch.save(student_of("resnet10t").encoder_state_dict(), path)
        with pytest.raises(ValueError, match=r"student\.pth does not fit.*'conv1\.weight'"):
            StudentEncoder("resnet18", image_size=64, checkpoint=str(path))

    def test_encoder_state_dict_has_no_classifier(self) -> None:
        student = StudentEncoder("resnet10t", image_size=64, num_classes=4)
        assert set(student.encoder_state_dict()) == set(plain_model("resnet10t", 64).state_dict())
        assert student.num_classes == student.model.num_classes == 4
