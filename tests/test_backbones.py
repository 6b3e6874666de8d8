from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from multikd.backbones import (
    Normalize,
    build_model,
    dry_run,
    final_features,
    is_skeleton,
    load_weights,
    meta_copy,
    plan_rungs,
    reached_parameters,
    read_state_dict,
    skeleton,
)
from multikd.backbones.features import _token_grid


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small operations on a shared machine: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestNames:
    def test_unknown_model_offers_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"'resnet10q'.*resnet10t"):
            build_model("resnet10q")

    def test_unknown_tag_offers_the_nearest_of_that_architecture(self) -> None:
        with pytest.raises(ValueError, match=r"tag 'vit_base_patch16_224.dinno'.*16_224\.dino'"):
            build_model("vit_base_patch16_224.dinno")

    def test_settings_a_family_lacks_are_named(self) -> None:
        with pytest.raises(ValueError, match="resnet10t has no setting 'patch_size'"):
            build_model("resnet10t", patch_size=8)

    def test_an_image_size_is_no_setting_of_a_cnn_and_no_mistake(self) -> None:
        assert isinstance(build_model("resnet10t", image_size=64), nn.Module)

    def test_drop_path_out_of_range(self) -> None:
        with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\), received 1"):
            build_model("resnet10t", drop_path=1.0)

    def test_pretrained_and_checkpoint_exclude_each_other(self) -> None:
        with pytest.raises(ValueError, match="not both"):
            build_model("resnet10t", pretrained=True, checkpoint="x.pth")

    def test_hub_out_of_reach_names_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: object, **kwargs: object) -> None:
            raise ConnectionError("no route to huggingface.co")

        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", offline)
        with pytest.raises(ValueError, match=r"no route to.*checkpoint=PATH") as info:
            build_model("resnet10t.c3_in1k", pretrained=True)
        assert "\n" not in str(info.value)

    def test_no_weights_at_all(self) -> None:
        with pytest.raises(ValueError, match=r"no pretrained weights for nf_resnet26.*checkpoint="):
            build_model("nf_resnet26", pretrained=True)


class TestSkeleton:
    def test_nothing_is_loaded_inside_and_the_flag_is_restored(self) -> None:
        assert not is_skeleton()
        with skeleton():
            assert is_skeleton()
            build_model("resnet10t.c3_in1k", pretrained=True)
            build_model("resnet10t", checkpoint="/does/not/exist.pth")
        assert not is_skeleton()

    def test_flag_is_restored_after_an_error(self) -> None:
        with pytest.raises(ValueError), skeleton():
            build_model("nonsense_model_name")
        assert not is_skeleton()


class TestNormalize:
    def test_is_float32_under_bfloat16_and_survives_to_empty(self) -> None:
        layer = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        images = torch.rand(2, 3, 4, 4)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        expected = (images - mean) / std
        assert torch.equal(layer(images), expected)
        assert torch.equal(copy.deepcopy(layer).bfloat16()(images), expected)
        emptied = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
        assert torch.equal(emptied(images), expected)
        assert not layer.state_dict()

    def test_refuses_bad_constants(self) -> None:
        with pytest.raises(ValueError, match="three numbers"):
            Normalize((0.5,), (0.5, 0.5, 0.5))
        with pytest.raises(ValueError, match="above 0"):
            Normalize((0.5, 0.5, 0.5), (0.5, 0.0, 0.5))


class TestMeasure:
    def test_meta_copy_holds_no_data_and_leaves_the_model(self) -> None:
        model = build_model("resnet10t")
        copied = meta_copy(model)
        assert all(p.is_meta for p in copied.parameters())
        assert all(b.is_meta for b in copied.buffers())
        assert not any(p.is_meta for p in model.parameters())

    def test_dry_run_restores_the_modes_it_found(self) -> None:
        model = build_model("resnet10t").train()
        model.layer1.eval()  # type: ignore[union-attr]

        def real_only(m: nn.Module, images: torch.Tensor) -> float:
            return float(final_features(m, images).summary.sum())  # type: ignore[union-attr]

        dry_run(model, (64, 64), real_only, "x")  # .item() is impossible on meta
        assert model.training
        assert not model.layer1.training  # type: ignore[union-attr]

    def test_sizes_a_model_cannot_take(self) -> None:
        model = build_model("vit_tiny_patch16_224", image_size=64)
        with pytest.raises(ValueError, match=r"vit cannot take images of 65×65 px"):
            dry_run(model, (65, 65), final_features, "vit")

    def test_reach_leaves_random_state_weights_and_statistics_alone(self) -> None:
        model = build_model("resnet10t", drop_path=0.5).train()
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        reached = reached_parameters(
            model,
            (64, 64),
            lambda m, x: [final_features(m, x).patches],  # type: ignore[list-item]
        )
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        named = {name for name, _ in model.named_parameters()}
        assert named - reached == {"fc.weight", "fc.bias"}

    @pytest.mark.parametrize(
        ("count", "size", "grid"),
        [(49, (224, 224), (7, 7)), (98, (448, 224), (14, 7)), (6, (64, 96), (2, 3))],
    )
    def test_grid_without_a_patch_embedding_follows_the_aspect(
        self, count: int, size: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        assert _token_grid(nn.Identity(), count, size) == grid


@pytest.fixture(scope="module")
def ten_classes() -> nn.Module:
    return build_model("resnet10t", num_classes=10)


class TestRungs:
    @pytest.mark.parametrize(
        ("rungs", "indices"),
        [("all", (0, 1, 2, 3, 4)), ("last", (4,)), ([-1, 2], (2, 4)), ([-5], (0,))],
    )
    def test_resolve(self, ten_classes: nn.Module, rungs: object, indices: tuple[int, ...]) -> None:
        assert plan_rungs(ten_classes, rungs, (64, 64), "x").indices == indices  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("rungs", "message"),
        [
            ([5], r"resnet has 5 rungs.*\[-5, 4\], received 5"),
            ([-6], "received -6"),
            ([], "empty list"),
            ([4, -1], "same rung twice"),
            ("first", "'all', 'last' or a list"),
        ],
    )
    def test_errors(self, ten_classes: nn.Module, rungs: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plan_rungs(ten_classes, rungs, (64, 64), "resnet")  # type: ignore[arg-type]

    def test_family_without_intermediates(self) -> None:
        class Bare(nn.Module):
            pass

        with pytest.raises(ValueError, match="bare cannot be a student"):
            plan_rungs(Bare(), "all", (64, 64), "bare")


class TestWeights:
    @pytest.fixture
    def fresh(self) -> nn.Module:
        return build_model("resnet10t", num_classes=10)

    @pytest.mark.parametrize("wrap", ["plain", "state_dict", "prefix", "lightning", "safetensors"])
    def test_every_form_of_file(
        self, ten_classes: nn.Module, fresh: nn.Module, tmp_path: Path, wrap: str
    ) -> None:
        tensors = ten_classes.state_dict()
        path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pth")
        if wrap == "safetensors":
            save_file(tensors, path)
        else:
            content: dict[str, object] = {
                "plain": tensors,
                "state_dict": {"state_dict": tensors, "epoch": 3},
                "prefix": {"model": {f"module.backbone.{k}": v for k, v in tensors.items()}},
                "lightning": {
                    "state_dict": {
                        **{f"student.model.{k}": v for k, v in tensors.items()},
                        "ladder.weight": torch.zeros(3),
                    }
                },
            }[wrap]
            torch.save(content, path)
        load_weights(fresh, read_state_dict(path), path.name)
        for key, value in fresh.state_dict().items():
            assert torch.equal(value, tensors[key]), key

    def test_first_offending_tensor_is_named(self, fresh: nn.Module) -> None:
        tensors = dict(fresh.state_dict())
        tensors["layer2.0.conv1.weight"] = torch.zeros(3, 3)
        with pytest.raises(ValueError, match=r"w\.pth.*'layer2\.0\.conv1\.weight' is \(3, 3\)"):
            load_weights(fresh, tensors, "w.pth")

    def test_missing_tensor_is_named(self, fresh: nn.Module) -> None:
        tensors = dict(fresh.state_dict())
        del tensors["layer3.0.conv1.weight"]
        with pytest.raises(ValueError, match=r"lacks 'layer3\.0\.conv1\.weight'"):
            load_weights(fresh, tensors, "w.pth")

    def test_left_over_tensor_is_named(self, fresh: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"'extra' has no place"):
            load_weights(fresh, {**fresh.state_dict(), "extra": torch.zeros(1)}, "w.pth")

    def test_foreign_weights_are_refused(self, fresh: nn.Module) -> None:
        with pytest.raises(ValueError, match="lacks 'conv1.0.weight'"):
            load_weights(fresh, {"tok.weight": torch.zeros(2)}, "w.pth")

    def test_two_fitting_models_are_not_chosen_between(self, fresh: nn.Module) -> None:
        state = fresh.state_dict()
        both = {f"{p}.{k}": v for p in ("ema", "student") for k, v in state.items()}
        with pytest.raises(ValueError, match=r"several fitting models.*ema.*student"):
            load_weights(fresh, both, "w.pth")

    def test_classifier_of_another_size_is_left_or_adopted(self, ten_classes: nn.Module) -> None:
        tensors = ten_classes.state_dict()
        other = build_model("resnet10t", num_classes=7)
        start = other.fc.weight.clone()  # type: ignore[union-attr, operator]
        load_weights(other, tensors, "w.pth")
        assert torch.equal(other.fc.weight, start)  # type: ignore[union-attr, arg-type]
        load_weights(other, tensors, "w.pth", adapt_classifier=True)
        assert torch.equal(other.fc.weight, tensors["fc.weight"])  # type: ignore[union-attr, arg-type]
        headless = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
        load_weights(other, headless, "w.pth", adapt_classifier=True)
        assert other.num_classes == 0

    def test_position_embeddings_of_another_size_are_resampled(self) -> None:
        large = build_model("vit_tiny_patch16_224", image_size=96, num_classes=0)
        small = build_model("vit_tiny_patch16_224", image_size=64, num_classes=0)
        load_weights(small, large.state_dict(), "w.pth")
        assert small.pos_embed.shape == (1, 17, 192)  # type: ignore[union-attr]
        key = "blocks.0.attn.qkv.weight"
        assert torch.equal(small.state_dict()[key], large.state_dict()[key])

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "no readable"), (b"not a checkpoint", "cannot be read|no re")],
    )
    def test_broken_files(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "broken.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_state_dict(path)

    def test_broken_safetensors(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.safetensors"
        path.write_bytes(b"\0" * 20)
        with pytest.raises(ValueError, match=re.escape(path.name)):
            read_state_dict(path)

    def test_pickled_objects_are_not_executed(self, tmp_path: Path) -> None:
        path = tmp_path / "objects.pth"
        torch.save({"state_dict": Path("x")}, path)
        with pytest.raises(ValueError, match="without executing pickled code"):
            read_state_dict(path)

    def test_missing_file_and_no_tensors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no checkpoint at"):
            read_state_dict(tmp_path / "absent.pth")
        path = tmp_path / "numbers.pth"
        torch.save({"epoch": 3}, path)
        with pytest.raises(ValueError, match="holds no tensors"):
            read_state_dict(path)
