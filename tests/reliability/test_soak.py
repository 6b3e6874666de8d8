"""The kill soak in small: SIGKILL of a rank, resume, compare; at length: tools/soak/kill_resume.py.

(That a single process goes on bit for bit: test_resume_inside.py and test_preemption.py.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_kill_of_one_of_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "soak" / "kill_resume.py")]
    command += [
        "--kills=0",
        "--kills-ranks=1",
        "--epochs=2",
        "--seed=1",
        f"--json={tmp_path / 'soak.json'}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    (row,) = rows
    assert row["variant"] == "2 processes, 0 workers"
    assert row["kills"] == 1
    assert row["rows"] >= 40  # of both ranks
    assert row["differences"] == []
    assert "| 2 processes, 0 workers | 1 | 1 |" in done.stdout
