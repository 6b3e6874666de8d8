import json

import pytest
import torch
from helpers.subjects import MemorySplit, MemorySubject

from multikd.evaluation.task import NotApplicable
from multikd.evaluation.zero_shot import ZeroShot, zero_shot_scores
from multikd.export.text import TextTower
from multikd.teachers import load_encoder

open_clip = pytest.importorskip("open_clip")

NAME = "multikd-zero-shot"
CLASSES = ["cat", "dog", "ant", "bee", "cow", "pig", "hen"]
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.", "{}")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "patch_size": 8,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    (folder / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    model = open_clip.create_model(NAME).eval()
    path = folder / "weights.pt"
    torch.save(model.state_dict(), path)
    return model, str(path)


@pytest.fixture
def subject(clip):
    _, path = clip
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 7, (40,), generator=generator)
    labels[4] = -1
    split = MemorySplit(images, labels, classes=CLASSES, metadata={"site": ["a", "b"] * 20})
    encoder = load_encoder(f"open_clip:{NAME}", path).eval()
    tower = TextTower(f"open_clip:{NAME}", path)
    return MemorySubject({"test": split}, encoder, text=tower.class_weights)


def test_equals_open_clips_own_classifier(clip, subject):
    model, _ = clip
    split = subject.splits["test"]
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            model,
            open_clip.get_tokenizer(NAME),
            CLASSES,
            [lambda c, t=t: t.replace("{}", c) for t in TEMPLATES],
            num_classes_per_batch=3,
        )
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (subject.spec.mean, subject.spec.std))
        features = model.encode_image((split.images / 255 - mean) / std, normalize=True)
        logits = features @ classifier
    scores = zero_shot_scores(
        subject.features("test").summary, subject.text_weights(CLASSES, TEMPLATES)
    )
    torch.testing.assert_close(scores.float(), logits, atol=1e-5, rtol=0)
    task = ZeroShot("data", templates=TEMPLATES, groups=("site",))
    task.check(subject.splits, {"clip": subject.spec})
    result = task.score(subject)
    kept = split.labels >= 0
    right = (logits.argmax(1) == split.labels)[kept]
    assert result.per_sample.tolist() == right.double().tolist()
    assert result.value == pytest.approx(float(right.double().mean()))
    top = logits[kept].topk(5).indices
    assert result.metrics["top5"] == pytest.approx(
        float((top == split.labels[kept][:, None]).any(1).double().mean())
    )
    assert torch.tensor(result.details["confusion"]).sum() == 39
    assert torch.tensor(result.details["confusion"]).diagonal().sum() == int(right.sum())
    assert result.details["groups"]["site"]["groups"]["a"]["count"] == 19
    # Fifteen times chance would show labels leaking in; the model is random.
    assert 0 < result.value < 0.5


def test_texts_decide(subject):
    """Labels that are the classifier's own answers are all right: the order of classes is kept."""
    split = subject.splits["test"]
    weights = subject.text_weights(CLASSES, TEMPLATES)
    split.labels = zero_shot_scores(subject.features("test").summary, weights).argmax(1)
    assert ZeroShot("data", templates=TEMPLATES).score(subject).value == 1
    shifted = ZeroShot("data", templates=TEMPLATES, classes=tuple(CLASSES[1:] + CLASSES[:1]))
    assert shifted.score(subject).value == 0


def test_encoders_without_texts_are_left_out(subject):
    def refuse(classes, templates):
        raise NotApplicable("no text tower")

    subject.text = refuse
    with pytest.raises(NotApplicable):
        ZeroShot("data").score(subject)
    assert ZeroShot("data").applies(subject)
    subject.text = None
    assert not ZeroShot("data").applies(subject)


def test_bad_input_says_what_was_expected(subject):
    splits, specs = subject.splits, {}
    with pytest.raises(ValueError, match=r"needs \{\}"):
        ZeroShot("data", templates=("a cat",))
    with pytest.raises(ValueError, match="labels go up to 6, and there are 2"):
        ZeroShot("data", classes=("a", "b")).check(splits, specs)
    with pytest.raises(ValueError, match="'cat' stands twice"):
        ZeroShot("data", classes=("cat",) * 7).check(splits, specs)
    with pytest.raises(ValueError, match="metadata column"):
        ZeroShot("data", groups=("skin",)).check(splits, specs)
    splits["test"].classes = None
    with pytest.raises(ValueError, match="needs class names"):
        ZeroShot("data").check(splits, specs)
    with pytest.raises(ValueError, match="one joint space"):
        zero_shot_scores(torch.ones(2, 3), torch.ones(2, 4))
