"""Results on the disk: a JSON for each scene, written whole when the scene ends, and the settings they were made with.

Each scene has a file of its own. So a run goes on where it ended, and processes that share the scenes need no other way
to put their results together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ..arguments import file_path
from ..compare.report import backbone_name
from ..errors import PaceError
from ..runtime.files import environment, write_json
from ..training.states import results_folder, writing
from ..version import __version__
from .plan import Job, Plan, without_folder
from .protocols import PUBLISHED, PUBLISHED_CONFIDENCE

RUN, SUMMARY, TABLE, PICTURE = "run.json", "summary.json", "summary.md", "changes.png"
CALIBRATION = "calibration.safetensors"
SCENES = "scenes"  # the folder of their JSONs


def settings_of(plan: Plan, digests: Mapping[str, str | None]) -> dict[str, Any]:
    """All that results depend on, as JSON values; they tell no folder of this machine.

    Args:
        plan: what is run.
        digests: of what files hold, by what they are of; see `SceneRunner.digests`.
    """
    options = plan.options
    where = environment(plan.runs.device)
    given = options.weights
    return {
        "pacevggt_patch": __version__,
        "dataset": options.dataset,
        "data": folder_name(options.data),
        "meshes": None if options.meshes is None else folder_name(options.meshes),
        "protocol": options.protocol,
        "confidence": PUBLISHED_CONFIDENCE if options.protocol == PUBLISHED else None,
        "frames": options.frames,
        "stride": options.stride,
        "pictures": f"{plan.frame.width} pixels wide, {plan.frame.mode}, patches of {plan.frame.patch}",
        "backbone": without_folder(backbone_name(plan.runs.options)),
        "keep_ratios": [config.keep_ratio for config in plan.runs.configs],
        "modes": [config.mode for config in plan.runs.configs],
        "merge_budget": options.merge_budget,
        "weights": None if given is None else without_folder(str(given)),
        **digests,
        "compile": options.compile,
        "precision": plan.runs.precision,
        "device": where["device"],
        "torch": where["torch"],
        "scenes": {job.name: len(job.scene) for job in plan.jobs},
    }


def folder_name(folder: str | PathLike[str]) -> str:
    """The name of a folder, and a digest that tells where it is to who knows that already."""
    place = file_path("folder", folder).resolve()
    return f"{place.name} ({hashlib.sha256(str(place).encode()).hexdigest()[:12]})"


class Results:
    """The folder of a run.

    Args:
        plan: what is run.
        digests: as in `settings_of`.
    """

    def __init__(self, plan: Plan, digests: Mapping[str, str | None]):
        self.folder = file_path("out", plan.options.out)
        self.files = [job.file for job in plan.jobs]
        self.settings = settings_of(plan, digests)
        self.calibration = self.folder / CALIBRATION
        given = plan.options.backbone, plan.options.weights
        # Of an object nobody can tell whether it is that of an earlier run.
        self.can_go_on = all(isinstance(value, str | PathLike | None) for value in given)

    def open(self) -> None:
        """Begin a run, or go on with one of the same settings.

        Raises:
            PaceError: the folder holds a run with other settings, or can't be written to.
        """
        results_folder(self.folder, (RUN, SUMMARY, TABLE, PICTURE, CALIBRATION))
        results_folder(self.folder / SCENES, self.files)
        file = self.folder / RUN
        if not file.exists():
            self.write(file, self.settings)
            return
        earlier = read_json(file)
        keys = dict.fromkeys((*self.settings, *earlier))
        other = [key for key in keys if earlier.get(key) != self.settings.get(key)]
        if other:
            what = ", ".join(in_words(key, earlier.get(key), self.settings.get(key)) for key in other)
            raise PaceError(f"{self.folder} holds a run with {what}: choose another --out")
        if not self.can_go_on:
            raise PaceError(
                f"{self.folder} holds a run, and whether it is of this model can't be told: choose another out"
            )

    def has(self, job: Job) -> bool:
        """Whether a scene is done."""
        return (self.folder / SCENES / job.file).exists()

    def save(self, job: Job, result: dict[str, Any]) -> None:
        """Write the result of a scene, whole or not at all."""
        self.write(self.folder / SCENES / job.file, result)

    def read(self, job: Job) -> dict[str, Any]:
        """The result of a scene.

        Raises:
            PaceError: it is missing, damaged, or of another scene.
        """
        file = self.folder / SCENES / job.file
        found = read_json(file)
        if found.get("scene") != job.name or not isinstance(found.get("sides"), list):
            raise PaceError(f"{file} is no result of scene {job.name}: delete it, and the scene runs again")
        return found

    def write(self, file: Path, value: Any) -> None:
        """Write JSON; an error of the disk is a PaceError that names the file."""
        with writing(file):
            write_json(file, value)


def in_words(key: str, earlier: Any, now: Any) -> str:
    """A setting in which a run differs from an earlier one: of numbers of frames both, for they are short."""
    if key not in ("frames", "stride"):
        return f"another {key}"
    before, after = ("none" if value is None else value for value in (earlier, now))
    return f"--{key} {before}, not {after}"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PaceError: it can't be read as one.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise PaceError(f"{file} can't be read as JSON: delete it, or choose another --out") from error
    return found
