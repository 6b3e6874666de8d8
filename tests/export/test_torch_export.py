import subprocess
import sys

import pytest
import torch
from small_models import deployed

from multikd.export.deployed import DeployedEncoder
from multikd.export.torch_export import export_pt2, export_torchscript
from multikd.students import StudentEncoder

# Neither this project nor timm is needed to run a .pt2.
CHILD = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('multikd', 'timm'):
            raise ImportError(name + ' is hidden')
sys.meta_path.insert(0, Hide())
import torch
torch.set_num_threads(1)
folder = sys.argv[1]
images = torch.load(folder + '/images.pt', weights_only=True)
torch.save([
    torch.export.load(folder + '/a.pt2').module()(images),
    torch.jit.load(folder + '/a.pt')(images),
], folder + '/out.pt')
"""


def test_both_run_where_multikd_and_timm_are_hidden(tmp_path) -> None:
    student = StudentEncoder("test_vit4", image_size=64).eval()
    report = export_pt2(student, tmp_path / "a.pt2")
    assert report.parity["max_relative_error"] <= 1e-5
    assert report.parity["images"] == "synthetic"
    script = export_torchscript(student, tmp_path / "a.pt")
    assert script.settings["dynamic"] == ["batch"]
    images = torch.rand(3, 3, 64, 64)
    torch.save(student.normalize(images), tmp_path / "images.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path)], check=True, timeout=200
    )
    with torch.inference_mode():
        expected = student.features(images).summary
    for received in torch.load(tmp_path / "out.pt", weights_only=True):
        assert torch.allclose(received, expected, atol=1e-5 * float(expected.abs().max()))


def test_tokens_and_preprocessing(tmp_path) -> None:
    encoder = deployed("Swin", output="tokens", preprocessing=True)
    report = export_pt2(encoder, tmp_path / "a.pt2")
    assert report.settings["output"] == "tokens"
    images = torch.randint(0, 256, (2, 3, 70, 100), dtype=torch.uint8)
    received = torch.export.load(tmp_path / "a.pt2").module()(images)
    assert received.ndim == 4
    assert torch.equal(received, encoder(images))


class DataDependent(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if bool(images.mean() > 0) else images.amax((2, 3))


def test_what_cannot_be_traced_is_one_sentence(tmp_path) -> None:
    encoder = deployed("ResNet")
    encoder.model = DataDependent()
    with pytest.raises(ValueError, match=r"torch.export cannot express ResNet.*timm folder"):
        export_pt2(encoder, tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests(tmp_path) -> None:
    student = StudentEncoder("test_resnet", image_size=64)
    with pytest.raises(ValueError, match="no classifier"):
        export_pt2(student, tmp_path / "a.pt2", classifier=True)
    with pytest.raises(ValueError, match="no tokens"):
        DeployedEncoder(torch.nn.Identity(), student.spec, output="tokens")
    with pytest.raises(ValueError, match="give a file name"):
        export_pt2(student, tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch) -> None:
    def full(*args, **settings):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nx")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match=r"a\.pt2 could not be written .*is the disk full\?"):
        export_pt2(deployed("ResNet"), tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []
