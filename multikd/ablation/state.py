"""A study's folder: what was planned, and its runs with what came out of them."""

from __future__ import annotations

from collections.abc import Sequence

from multikd.ablation.plan import Planner, Run, plan_json
from multikd.files import write_text_atomically
from multikd.runs.folder import RunsFolder
from multikd.untrusted import read_json

PLAN = "plan.json"


class StudyFolder(RunsFolder):
    """Files of a study: those of its runs, and the plan.

    Args:
        out: the folder.
    """

    def write_plan(self, planner: Planner, runs: Sequence[Run]) -> None:
        """Add runs to the plan, each with its config.

        Raises:
            ValueError: a run of that name was made with other settings.
        """
        known = self.plan()
        # What all of them share comes from the folder, not from here.
        for run in runs:
            self.put_config(run, planner.config(run))
        names = {run.name for run in known}
        added = [run for run in runs if run.name not in names]
        if added or not (self.out / PLAN).exists():
            write_text_atomically(self.out / PLAN, plan_json([*known, *added]))

    def plan(self) -> list[Run]:
        """The runs so far; none before there is a plan."""
        try:
            return [Run.from_json(entry) for entry in read_json(self.out / PLAN)]
        except FileNotFoundError:
            return []
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.out / PLAN} is no plan of a study: remove it") from error
