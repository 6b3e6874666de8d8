from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from multikd.teachers import BackboneEncoder, Teacher, TeacherDict, TimmEncoder
from multikd.teachers.resized import shared_sizes
from multikd.types import EncoderSpec, TokenFeatures, Widths

# family → (timm name, image size, grid, widths)
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 64, (4, 4), Widths(192, 192)),
    "registers": ("vit_small_patch14_reg4_dinov2", 56, (4, 4), Widths(384, 384)),
    "class-less": ("vit_wee_patch16_reg1_gap_256", 64, (4, 4), Widths(256, 256)),
    "swin": ("swin_tiny_patch4_window7_224", 64, (2, 2), Widths(768, 768)),
    "convnext": ("convnext_atto", 64, (2, 2), Widths(320, 320)),
    "efficientnet": ("efficientnet_lite0", 64, (2, 2), Widths(1280, 1280)),
    "resnet": ("resnet10t", 64, (2, 2), Widths(512, 512)),
    "mobilenet": ("mobilenetv3_small_050", 64, (2, 2), Widths(1024, 288)),
    "nhwc": ("mambaout_femto", 64, (2, 2), Widths(1152, 288)),
    "class attention": ("cait_xxs24_224", 64, (4, 4), Widths(192, 192)),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small operations on a shared machine: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def encoder_of(family: str) -> TimmEncoder:
    torch.manual_seed(0)
    name, size, _, _ = FAMILIES[family]
    encoder = TimmEncoder(name, pretrained=False, image_size=size)
    _lively(encoder)
    return encoder


def _lively(encoder: nn.Module) -> None:
    """Give batch norms statistics and weights that are not the identity."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)


def images(size: int = 64, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def resnet() -> Teacher:
    return Teacher(copy.deepcopy(encoder_of("resnet")))


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_features_are_timm_s_with_own_mean_and_std_once(self, family: str) -> None:
        _, size, grid, widths = FAMILIES[family]
        encoder = encoder_of(family)
        model = copy.deepcopy(encoder.model).eval()
        teacher = Teacher(copy.deepcopy(encoder))
        features = teacher(images(size))
        mean = torch.tensor(encoder.spec.mean).view(1, 3, 1, 1)
        std = torch.tensor(encoder.spec.std).view(1, 3, 1, 1)
        with torch.no_grad():
            normalised = (images(size) - mean) / std
            final = model.forward_features(normalised)  # type: ignore[operator]
            summary = model.forward_head(final, pre_logits=True)  # type: ignore[operator]
            logits = model(normalised)
        assert features.widths == teacher.widths == widths
        assert features.grid == grid == teacher.grid_for((size, size))
        # Folding and channels_last may cost the last bits, nothing else.
        torch.testing.assert_close(features.summary, summary, atol=1e-4, rtol=1e-4)
        if logits.shape != summary.shape:
            torch.testing.assert_close(features.logits, logits, atol=1e-4, rtol=1e-4)
            assert teacher.num_classes == logits.shape[1]
        patches = features.patches
        if final.ndim == 3:
            torch.testing.assert_close(patches, final[:, -patches.shape[1] :])
        else:
            first = final[:, 0, 1] if family in ("swin", "nhwc") else final[:, :, 0, 1]
            torch.testing.assert_close(patches[:, 1], first, atol=1e-4, rtol=1e-4)

    def test_other_sizes_are_resized_to_its_own(self, family: str) -> None:
        grid = FAMILIES[family][2]
        teacher = Teacher(copy.deepcopy(encoder_of(family)))
        assert teacher(images(48)).grid == grid == teacher.grid_for((48, 48))


class TestFrozen:
    def test_stays_in_eval_without_gradients(self, resnet: Teacher) -> None:
        parent = nn.ModuleDict({"t": resnet}).train()
        parent.requires_grad_(True)
        assert not any(module.training for module in resnet.encoder.modules())
        assert not resnet.training
        assert not any(p.requires_grad for p in resnet.encoder.parameters())
        pixels = images().requires_grad_()
        features = resnet(pixels)
        assert not features.summary.requires_grad
        assert not features.summary.is_inference()

    def test_features_can_be_saved_for_a_backward(self, resnet: Teacher) -> None:
        weight = torch.ones(512, requires_grad=True)
        (resnet(images()).summary * weight).sum().backward()
        assert weight.grad is not None

    def test_repeated_calls_do_not_drift(self, resnet: Teacher) -> None:
        resnet.train()
        assert torch.equal(resnet(images()).summary, resnet(images()).summary)

    def test_is_in_no_list_of_parameters_and_no_state_dict(self, resnet: Teacher) -> None:
        teachers = TeacherDict({"r": resnet})
        assert not list(teachers.parameters())
        assert not list(teachers.buffers())
        assert not teachers.state_dict()

    def test_strict_load_of_a_parent(self, resnet: Teacher) -> None:
        def parent() -> nn.Module:
            holder = nn.Module()
            holder.teachers = TeacherDict({"r": resnet})
            holder.bare = resnet
            holder.layer = nn.Linear(2, 2)
            return holder

        source = parent()
        state = source.state_dict()
        assert set(state) == {"layer.weight", "layer.bias"}
        target = parent()
        target.load_state_dict(state, strict=True)
        with pytest.raises(RuntimeError, match="Missing key"):
            target.load_state_dict({"layer.weight": state["layer.weight"]}, strict=True)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            target.load_state_dict({**state, "teachers.r.x": torch.zeros(1)}, strict=True)

    def test_deepcopy_shares_the_encoder(self, resnet: Teacher) -> None:
        parent = nn.ModuleDict({"t": resnet})
        copied = copy.deepcopy(parent)
        twin = copied["t"]
        assert isinstance(twin, Teacher)
        assert twin is not resnet
        assert twin.encoder is resnet.encoder
        copied.to("meta")  # a copy must not drag the original along
        assert torch.equal(twin(images()).summary, resnet(images()).summary)

    def test_pickle_round_trip(self, resnet: Teacher) -> None:
        twin = pickle.loads(pickle.dumps(resnet))
        assert torch.equal(twin(images()).summary, resnet(images()).summary)


class TestDtype:
    def test_keeps_its_own_under_bf16_true(self, resnet: Teacher) -> None:
        expected = resnet(images()).summary
        nn.ModuleDict({"t": resnet}).bfloat16()
        assert next(resnet.encoder.parameters()).dtype == torch.float32
        assert torch.equal(resnet(images()).summary, expected)

    def test_keeps_its_own_under_autocast(self, resnet: Teacher) -> None:
        expected = resnet(images()).summary
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(resnet(images()).summary, expected)

    def test_explicit(self) -> None:
        teacher = Teacher(copy.deepcopy(encoder_of("resnet")), dtype="bfloat16")
        features = teacher(images())
        assert features.summary.dtype == features.patches.dtype == torch.bfloat16
        exact = Teacher(copy.deepcopy(encoder_of("resnet")))(images()).summary
        cosine = torch.cosine_similarity(features.summary.float(), exact)
        assert cosine.min() > 0.99

    def test_auto_is_bfloat16_on_cuda_only(self, resnet: Teacher) -> None:
        assert resnet._dtype_on(torch.device("cuda")) == torch.bfloat16
        assert resnet._dtype_on(torch.device("cpu")) == torch.float32

    def test_follows_the_parent_to_another_device(self, resnet: Teacher) -> None:
        nn.ModuleDict({"t": resnet}).to("meta")
        assert next(resnet.encoder.parameters()).is_meta
        with pytest.raises(ValueError, match="is on meta and the images are on cpu"):
            resnet(images())


class TestGeometry:
    def test_grid_resize_makes_the_grids_agree(self) -> None:
        teacher = Teacher(copy.deepcopy(encoder_of("registers")), resize="grid")  # patch 14
        assert teacher.grid_for((64, 64), student_patch=16) == (4, 4)
        assert teacher(images(64), student_patch=16).grid == (4, 4)
        assert teacher.input_size((96, 64), 16) == (84, 56)
        assert teacher.grid_for((96, 64), 16) == (6, 4)
        assert teacher(torch.rand(1, 3, 96, 64), 16).grid == (6, 4)

    def test_aligned_corners_are_dune_s_resize(self) -> None:
        encoder = encoder_of("registers")
        pixels = images(64)
        plain = Teacher(copy.deepcopy(encoder), resize="grid")
        aligned = Teacher(copy.deepcopy(encoder), resize="grid", align_corners=True)
        by_hand = nn.functional.interpolate(
            pixels, (56, 56), mode="bicubic", align_corners=True
        ).clamp(0, 1)
        expected = Teacher(copy.deepcopy(encoder), resize="none")(by_hand)
        with shared_sizes():  # what one of them made is not the other's
            first, second = plain(pixels, 16), aligned(pixels, 16)
        torch.testing.assert_close(second.patches, expected.patches)
        assert not torch.allclose(first.patches, second.patches, atol=1e-3)
        assert plain.fingerprint() != aligned.fingerprint()  # caches of one are not the other's
        with pytest.raises(ValueError, match="set resize to 'own' or 'grid'"):
            Teacher(copy.deepcopy(encoder), resize="none", align_corners=True)

    def test_grid_resize_needs_the_student_s_patch(self) -> None:
        teacher = Teacher(copy.deepcopy(encoder_of("registers")), resize="grid")
        with pytest.raises(ValueError, match="needs a student patch of at most 64 px"):
            teacher(images(64))

    def test_a_fixed_teacher_whose_grid_cannot_match(self) -> None:
        encoder = copy.deepcopy(encoder_of("resnet"))
        encoder.spec = dataclasses.replace(encoder.spec, fixed_size=True)
        teacher = Teacher(encoder, resize="grid")
        with pytest.raises(ValueError, match="use resize='own'"):
            teacher.grid_for((128, 128), 16)

    def test_none_leaves_the_image(self) -> None:
        teacher = Teacher(copy.deepcopy(encoder_of("resnet")), resize="none")
        assert teacher(images(96)).grid == (3, 3) == teacher.grid_for((96, 96))

    def test_resize_is_antialiased_bicubic_within_range(self, resnet: Teacher) -> None:
        seen: list[Tensor] = []
        resnet.encoder.normalize.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda m, inputs: seen.append(inputs[0])
        )
        big = (torch.rand(1, 3, 256, 256) > 0.5).float()
        resnet(big)
        expected = torch.nn.functional.interpolate(
            big, (64, 64), mode="bicubic", antialias=True, align_corners=False
        )
        torch.testing.assert_close(seen[0], expected.clamp(0, 1))

    def test_image_size_overrides_and_a_fixed_one_refuses(self) -> None:
        teacher = Teacher(copy.deepcopy(encoder_of("resnet")), image_size=96)
        assert teacher(images()).grid == (3, 3)
        encoder = copy.deepcopy(encoder_of("resnet"))
        encoder.spec = dataclasses.replace(encoder.spec, fixed_size=True)
        with pytest.raises(ValueError, match="takes images of"):
            Teacher(encoder, image_size=96)


class TestFolding:
    @pytest.mark.parametrize("family", ["resnet", "efficientnet", "mobilenet"])
    def test_is_exact_and_removes_the_norms(self, family: str) -> None:
        encoder = copy.deepcopy(encoder_of(family))
        plain = Teacher(copy.deepcopy(encoder), fold=False, channels_last=False)
        folded = Teacher(encoder)
        assert any(isinstance(m, nn.BatchNorm2d) for m in plain.encoder.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.encoder.modules())
        a, b = plain(images()), folded(images())
        torch.testing.assert_close(b.patches, a.patches, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b.summary, a.summary, atol=1e-4, rtol=1e-4)
        assert not any(p.requires_grad for p in folded.encoder.parameters())

    def test_is_undone_where_it_is_not_exact(self) -> None:
        class Scaled(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.spec = encoder_of("resnet").spec
                self.conv = Scaled(3, 8, 8, stride=8)
                self.norm = nn.BatchNorm2d(8)
                self.norm.bias.data.fill_(1.0)

            def forward(self, x: Tensor) -> TokenFeatures:
                return TokenFeatures(self.norm(self.conv(x)).mean((2, 3)))

        net = Net().eval()
        expected = net(images()).summary.detach()
        teacher = Teacher(net, fold=True)
        assert isinstance(net.norm, nn.BatchNorm2d)
        assert torch.equal(teacher(images()).summary, expected)


class TestFingerprint:
    def test_same_weights_same_print_whatever_the_dtype_or_folding(self) -> None:
        encoder = encoder_of("resnet")
        prints = {
            Teacher(copy.deepcopy(encoder)).fingerprint(),
            Teacher(copy.deepcopy(encoder), fold=False).fingerprint(),
            Teacher(copy.deepcopy(encoder), dtype="bfloat16", fold=False).fingerprint(),
            Teacher(copy.deepcopy(encoder), channels_last=False).fingerprint(),
        }
        assert len(prints) == 1

    def test_weights_and_preprocessing_count(self) -> None:
        encoder = encoder_of("resnet")
        changed = copy.deepcopy(encoder)
        with torch.no_grad():
            changed.model.conv1[0].weight[0, 0, 0, 0] += 0.1  # type: ignore[index, union-attr]
        prints = {
            Teacher(copy.deepcopy(encoder)).fingerprint(),
            Teacher(changed).fingerprint(),
            Teacher(copy.deepcopy(encoder), mean=(0.1, 0.1, 0.1)).fingerprint(),
            Teacher(copy.deepcopy(encoder), image_size=96).fingerprint(),
            Teacher(copy.deepcopy(encoder), resize="none").fingerprint(),
        }
        assert len(prints) == 5


class TestUsersEncoders:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spec = EncoderSpec(
                "mine", Widths(4, None), (8, 8), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
            )
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> TokenFeatures:
            return TokenFeatures(self.layer(x.mean((2, 3))))

    def test_any_module_with_a_spec(self) -> None:
        teacher = Teacher(self.Mine())
        assert teacher(images(32)).summary.shape == (2, 4)
        assert teacher.grid_for((8, 8)) is None

    def test_runs_under_autocast_in_another_dtype(self) -> None:
        teacher = Teacher(self.Mine(), dtype="bfloat16")
        assert teacher(images(8)).summary.dtype == torch.bfloat16
        assert next(teacher.encoder.parameters()).dtype == torch.float32

    def test_its_normalisation_is_its_own(self) -> None:
        with pytest.raises(ValueError, match="set mean and std there"):
            Teacher(self.Mine(), mean=(0.5, 0.5, 0.5))

    def test_a_bare_module_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"BackboneEncoder\(model"):
            Teacher(nn.Linear(2, 2))

    def test_a_timm_model_goes_in_wrapped(self) -> None:
        import timm

        model = timm.create_model("resnet10t", num_classes=0)
        encoder = BackboneEncoder(model, name="r", image_size=64, licence="mine")
        assert Teacher(encoder).spec.licence == "mine"


class TestErrors:
    def test_uint8(self, resnet: Teacher) -> None:
        with pytest.raises(ValueError, match="divide uint8 by 255"):
            resnet(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="resize must be"):
            Teacher(encoder_of("resnet"), resize="big")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="dtype must be"):
            Teacher(encoder_of("resnet"), dtype="int8")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="given by name"):
            Teacher(encoder_of("resnet"), checkpoint="x.pth")

    def test_names(self, resnet: Teacher) -> None:
        with pytest.raises(ValueError, match="without dots"):
            TeacherDict({"a.b": resnet})
        with pytest.raises(ValueError, match="is a Linear, not a Teacher"):
            TeacherDict({"a": nn.Linear(1, 1)})  # type: ignore[dict-item]
        assert TeacherDict({"a": resnet}).widths == {"a": Widths(512, 512)}
