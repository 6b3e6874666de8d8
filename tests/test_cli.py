"""The command line: quick help, one-sentence errors, names of shipped configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from multikd import __version__
from multikd.cli import _without_json, build_parser, main
from multikd.config_errors import condense
from multikd.console import messages_on_stderr, take_over_lightning
from multikd.shipped import (
    find_config,
    shipped_chains,
    shipped_configs,
    shipped_fragments,
    shipped_searches,
    shipped_studies,
    shipped_tasks,
)


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
        ["teachers", "stats"],
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
    assert main(["fti"]) == 2
    assert capsys.readouterr().err == "multikd: unknown command 'fti': did you mean 'fit'?\n"


def test_without_a_command_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "first steps:" in capsys.readouterr().out


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
    assert find_config("laptop.yaml") == shipped_configs()["laptop"]
    # The checkout's own folder is a path as well, from its root.
    assert find_config("configs/demo.yaml").resolve() == shipped_configs()["demo"].resolve()


def test_configs_lists_recipes_and_fragments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    recipes, tasks, studies, *rest, fragments = capsys.readouterr().out.split("\n\n")
    chains, sizes = rest
    for name in shipped_configs():
        assert f"\n  {name} " in recipes
    for name in shipped_tasks():
        assert f"\n  {name} " in tasks
    for name in shipped_studies():
        assert f"\n  {name} " in studies
    for name in shipped_chains():
        assert f"\n  {name} " in chains
    for name in shipped_searches():
        assert f"\n  {name} " in sizes
    for name in shipped_fragments():
        assert f"\n  {name}.yaml " in fragments
    assert main(["configs", "teachers/dino_vitb16.yaml"]) == 0
    assert "timm:vit_base_patch16_224.dino" in capsys.readouterr().out


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
    start = "model.projectors: MLPProjectors has no setting 'hiden': did you mean hidden"
    assert text.startswith(start)


@pytest.mark.parametrize(
    "message, known, sentence",
    [
        (
            "unrecognized arguments: --modle.x=3",
            ["--model", "--data"],
            "unknown setting --modle: did you mean --model?",
        ),
        (
            "Subcommand 'fit' does not accept option 'trainer.max_epoch'",
            ["--trainer.max_epochs", "--trainer.max_epochs.help"],
            "unknown setting trainer.max_epoch: did you mean trainer.max_epochs?",
        ),
        (
            "Group 'trainer' does not accept option 'max_epoch'",
            ["--trainer.max_epochs"],
            "unknown setting trainer.max_epoch: did you mean trainer.max_epochs?",
        ),
        (
            "Parser key \"data.batch_size\":\n  Expected a <class 'int'>. Got value: abc",
            [],
            "data.batch_size: expected a whole number, received 'abc'",
        ),
        # What is not known passes, on one line and not for ever.
        ("Something\nnew:\n  of jsonargparse", [], "Something new: of jsonargparse"),
        ("x" * 1000, [], "x" * 398 + " …"),
    ],
)
def test_condensed_errors(message: str, known: list[str], sentence: str) -> None:
    assert condense(message, known) == sentence


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_lightning_s_commands_begins_with_ours(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: multikd {command} ")
    head = text[: text.index("--trainer.accelerator")]
    assert head.count(f"\n  multikd {command} ") == (3 if command == "fit" else 1)
    for setting in ("target_grid", "HardestKept", "shard_cache_gb", "[must be given]"):
        assert setting in head


def test_messages_come_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning has handlers of its own; ours is the only one while a command runs."""
    import logging

    import lightning.pytorch

    own = logging.getLogger("multikd.somewhere")
    lightnings = logging.getLogger(f"{lightning.pytorch.__name__}.utilities.rank_zero")
    with messages_on_stderr():
        take_over_lightning()
        own.info("one")
        own.warning("two")
        lightnings.info("three")
        lightnings.info("TPU available: False, using: 0 TPU cores")
        lightnings.info("💡 Tip: For seamless cloud logging, try litlogger")
        own.debug("four")
    own.info("five")
    assert capsys.readouterr().err == "one\nwarning: two\nthree\n"


def test_json_of_lightning_s_commands_is_ours() -> None:
    assert _without_json(["a", "--json", "f", "b"]) == (["a", "b"], Path("f"))
    assert _without_json(["a", "--json=f"]) == (["a"], Path("f"))
    assert _without_json(["a"]) == (["a"], None)


def test_an_unknown_option_is_answered_by_its_own_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`evaluate` has a --format of no kind, and `shards write` has: it must not be offered."""
    assert main(["export", "a.ckpt", "b", "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "unknown option '--format': did you mean '--formats'" in error
    assert "multikd export --help" in error
