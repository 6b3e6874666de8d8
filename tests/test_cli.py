"""The command line: quick help, one-sentence errors, names of shipped configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from multikd import __version__
from multikd.cli import build_parser, main
from multikd.config_errors import condense
from multikd.shipped import find_config, shipped_configs


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "multikd", *args], capture_output=True, text=True, timeout=120
    )


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys\n"
        "from multikd.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'timm', 'lightning', 'numpy', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "multikd demo" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["shards", "write"],
        ["shards", "inspect"],
        ["teachers", "list"],
        ["teachers", "inspect"],
        ["export"],
        ["configs"],
    ],
)
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: multikd " + " ".join(command) in text
    assert "options:" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"multikd {__version__}"


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fti"])
    assert stop.value.code == 2
    assert "fti" in capsys.readouterr().err


def test_python_dash_m_is_the_command() -> None:
    done = run("configs")
    assert done.returncode == 0
    assert "unic_vitb16_imagenet" in done.stdout


def test_configs_prints_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "demo"]) == 0
    assert "efficientnet_lite0" in capsys.readouterr().out


def test_unknown_config_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "unic_vitb16"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unic_vitb16_imagenet" in error


def test_find_config_prefers_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "demo.yaml"
    mine.write_text("seed_everything: 1\n")
    assert find_config(str(mine)) == mine
    assert find_config("demo") == shipped_configs()["demo"]
    assert find_config("configs/demo.yaml") == shipped_configs()["demo"]


def test_every_shipped_config_says_what_it_is() -> None:
    for name, path in shipped_configs().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# "), f"{name} needs a first line that says what it is"


def test_missing_checkpoint_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "none.ckpt"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "there is no checkpoint" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_json_holds_the_figures(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    assert main(["teachers", "list", "packaged*", "--json", str(target)]) == 0
    assert "efficientnet_lite0" in json.dumps(json.loads(target.read_text()))


UNION = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'multikd.modules.DistillationModule':
        Parser key "projectors":
          Does not validate against any of the Union subtypes
          Errors:
            - Problem with given class_path 'multikd.projectors.MLPProjectors':
                Option 'hiden' is not accepted
            - Expected a <class 'NoneType'>
          Given value type: <class 'dict'>
  Given value: {'class_path': 'x'}"""


def test_condensed_error_names_path_class_and_nearest() -> None:
    text = condense(UNION)
    assert text == "model.projectors: MLPProjectors has no setting 'hiden': did you mean hidden?"


def test_condensed_error_of_an_unknown_option() -> None:
    text = condense("unrecognized arguments: --modle.x=3", ["--model", "--data"])
    assert text == "unknown option --modle.x: did you mean --model?"


def test_condensed_error_of_a_wrong_type() -> None:
    message = "Parser key \"data.batch_size\":\n  Expected a <class 'int'>. Got value: abc"
    assert condense(message) == "data.batch_size: expected a int. Got value: abc"
