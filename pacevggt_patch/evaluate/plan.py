"""What is evaluated on what: options, scenes and frames, checked before a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from ..arguments import file_path, shown, whole
from ..clips import Clip
from ..clips.folder import ClipFolder, existing_folder
from ..clips.framing import check_arguments
from ..clips.images import listed
from ..clips.rgbd import read_text
from ..clips.scannet import ScanNetScene
from ..clips.seven_scenes import SPLITS, SevenScenesSequence, split_sequences
from ..compare.plan import MINI_WIDTH, PRECISIONS, WIDTH, make_configs, patch_size, runs_mini
from ..compare.plan import Options as CompareOptions
from ..compare.plan import Plan as ComparePlan
from ..config import DEFAULT_KEEP_RATIO
from ..errors import ClipError, PaceError
from ..runtime.device import usable_device
from ..runtime.plotting import load_extra
from ..runtime.ranks import place_of_torchrun
from .protocols import CORRECTED, PUBLISHED, choose_frames

SCANNET, SEVEN_SCENES, FOLDER = "scannet", "7scenes", "folder"
DATASETS = (SCANNET, SEVEN_SCENES, FOLDER)
PROTOCOLS = (CORRECTED, PUBLISHED)
LIBRARIES = (("matplotlib", "pictures"), ("scipy", "distances between clouds"), ("tqdm", "long runs"))
LEAST_FRAMES = 4  # with which calibration and alignment work


class FrameSize(NamedTuple):
    """How pictures become frames, as in `load_clip`."""

    width: int
    mode: str
    patch: int


class Scene(Protocol):
    """A scene to evaluate on, of which nothing but the list of frames has been read.

    Attributes:
        name: of the scene.
        left_out: number of frames that have no pose.
        metres: whether that is the unit of its poses.
    """

    name: str
    left_out: int
    metres: bool

    def __len__(self) -> int:
        """Number of frames with a pose."""
        ...

    def check(self, numbers: Sequence[int], width: int, mode: str, patch: int) -> None:
        """Raise `ClipError` for a frame that does not fit, as far as can be told by the headers of its files."""
        ...

    def load(self, numbers: Sequence[int], width: int, mode: str, patch: int) -> Clip:
        """The clip of the frames with these numbers."""
        ...


class FolderScene:
    """A folder with a `clip.json` that has cameras.

    Raises:
        ClipError: it has none.
    """

    left_out = 0

    def __init__(self, path: Path):
        self.folder = ClipFolder(path)
        self.name = path.resolve().name
        self.metres = self.folder.description.get("pose_unit") == "metres"
        if self.folder.entries[0].get("cam_to_world") is None:
            raise ClipError(f"{path} has no clip.json with cameras, and there is nothing to compare with")

    def __len__(self) -> int:
        return len(self.folder)

    def check(self, numbers: Sequence[int], width: int, mode: str, patch: int) -> None:
        self.folder.check(width, mode, patch, self.chosen(numbers))

    def load(self, numbers: Sequence[int], width: int, mode: str, patch: int) -> Clip:
        return self.folder.load_entries(self.chosen(numbers), width, mode, patch)

    def chosen(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The entries of these frames."""
        return [self.folder.entries[number] for number in numbers]


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        data: folder of scenes, or of one scene.
        dataset: one of DATASETS.
        out: folder for the results.
        backbone, keep_ratios, modes, merge_budget, weights, device, precision, compile: as in `compare`.
        frames: of a scene; None takes all of every `stride`-th frame.
        stride: step between the frames that are there to choose from.
        protocol: one of PROTOCOLS.
        scenes: file with the names of the scenes, one a line; None takes all.
        most_scenes: every floor(n / most_scenes)-th of n scenes, at most so many; None takes all.
        meshes: folder with SCENE/SCENE_vh_clean_2.ply of "published"; None looks in the folder of each scene.
        width: of the frames, pixels; None takes 224 for VGGT-mini, else 518, or 512 where patches have 16 pixels.
    """

    data: str | PathLike[str]
    dataset: str
    out: str | PathLike[str] = "runs/evaluate"
    backbone: str | nn.Module = "mini"
    keep_ratios: tuple[float, ...] = (DEFAULT_KEEP_RATIO,)
    modes: tuple[str | None, ...] = (None,)
    merge_budget: float | None = None
    weights: Any = "auto"
    frames: int | None = None
    stride: int = 1
    protocol: str = CORRECTED
    scenes: str | PathLike[str] | None = None
    most_scenes: int | None = None
    meshes: str | PathLike[str] | None = None
    width: int | None = None
    device: str | None = None
    precision: str | None = None
    compile: bool = False


@dataclass(frozen=True)
class Job:
    """A scene, and what is taken of it.

    Attributes:
        scene: whose list of frames has been read.
        numbers: of the frames that are taken.
        mesh: of "published", else None.
    """

    scene: Scene
    numbers: list[int]
    mesh: Path | None

    @property
    def name(self) -> str:
        """Of the scene."""
        return self.scene.name

    @property
    def file(self) -> str:
        """The name of its JSON."""
        return f"{self.name.replace('/', '-')}.json"


@dataclass(frozen=True)
class Plan:
    """Options that can be followed.

    Attributes:
        jobs: the scenes, by name.
        frame: width, mode and patch: how pictures become frames, as in `load_clip`.
        runs: what runs the model.
    """

    options: Options
    jobs: tuple[Job, ...]
    frame: FrameSize
    runs: ComparePlan

    def load(self, job: Job) -> Clip:
        """The clip of a scene.

        Raises:
            PaceError: a file is broken; the message names the scene.
        """
        with naming(job.name):
            return job.scene.load(job.numbers, *self.frame)


@contextmanager
def naming(scene: str) -> Generator[None]:
    """Errors inside the `with` block name the scene."""
    try:
        yield
    except PaceError as error:
        raise type(error)(f"scene {scene}: {error}") from error
    except Exception:
        print(f"scene {scene} failed:", file=sys.stderr)
        raise


def without_folder(name: str) -> str:
    """What a user gave for a checkpoint or weights, of a file its name alone: results may be published."""
    family, colon, file = name.rpartition(":")
    path = Path(file).expanduser()
    return f"{family}{colon}{path.name}" if path.is_file() else name


def make_plan(options: Options) -> Plan:
    """Look at all that can be looked at before a model is loaded.

    Raises:
        PaceError: a library is missing, or a setting, a device, or a frame of a scene does not fit; in one sentence.
    """
    for name, what in LIBRARIES:
        load_extra(name, what, "eval")
    from tqdm import tqdm

    check_options(options)
    device = usable_device(options.device)
    precision = options.precision or ("float32" if device.type == "cpu" else "autocast")
    for_runs = CompareOptions(
        backbone=options.backbone,
        keep_ratios=options.keep_ratios,
        modes=options.modes,
        merge_budget=options.merge_budget,
        weights=options.weights,
        compile=options.compile,
        repeats=0,
    )
    runs = ComparePlan(for_runs, make_configs(for_runs), (), device, precision)
    frame = frame_size(options)
    folders = find_scenes(options)
    jobs = []
    hidden = place_of_torchrun()[0] > 0 or None  # None: shown where somebody looks
    for folder in tqdm(folders, desc="looking through scenes", unit="scene", disable=hidden, leave=False):
        for scene in scenes_in(folder, options.dataset):
            jobs.append(make_job(scene, folder, options, frame))
    files = [job.file for job in jobs]
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise PaceError(f"two scenes would both be written to {twice}: give one of them another name")
    return Plan(options, tuple(jobs), frame, runs)


def frame_size(options: Options) -> FrameSize:
    """How pictures become the frames that the model takes.

    Raises:
        PaceError: no whole number of patches is as wide as that.
    """
    mini, patch = runs_mini(options.backbone), patch_size(options.backbone)
    width = MINI_WIDTH if mini else WIDTH // patch * patch
    if options.width is not None:
        width = options.width
    check_arguments(None, 0, 1, width, "crop", patch)
    return FrameSize(width, "square" if mini else "crop", patch)


def check_options(options: Options) -> None:
    """Raise `PaceError` for a setting that does not fit."""
    for name, known in (("dataset", DATASETS), ("protocol", PROTOCOLS)):
        if getattr(options, name) not in known:
            raise PaceError(f"{name} must be one of {', '.join(known)}, got {shown(getattr(options, name))}")
    if options.precision is not None and options.precision not in tuple(PRECISIONS):
        raise PaceError(f"precision must be one of {', '.join(PRECISIONS)}, got {shown(options.precision)}")
    file_path("out", options.out)
    whole("stride", options.stride)
    if options.frames is None and options.stride == 1:
        raise PaceError("say how many frames of a scene to take: --frames, or --stride for every K-th one")
    if options.frames is not None:
        whole("frames", options.frames, LEAST_FRAMES)
    if options.most_scenes is not None:
        whole("most_scenes", options.most_scenes)
    if options.protocol == PUBLISHED:
        load_extra("plyfile", "meshes", "eval")
        if options.dataset != SCANNET:
            raise PaceError(
                f"the published protocol is one of ScanNet, and the dataset is {options.dataset}: "
                f"take the protocol {CORRECTED}"
            )
        if options.stride != 1 or options.width is not None:
            raise PaceError(
                "the published protocol says which frames, and how wide: leave stride and width out"
            )
    elif options.meshes is not None:
        raise PaceError(f"meshes are compared by the protocol {PUBLISHED} alone: leave them out")


def find_scenes(options: Options) -> list[Path]:
    """Folders of the scenes, by name.

    Raises:
        PaceError: there is none, or a scene of the list is missing.
    """
    folder = existing_folder(file_path("data", options.data))
    if options.scenes is None:
        if is_scene(folder, options.dataset):
            return [folder]
        check_layout(folder, options.dataset)
        names = listed(folder)[1]
        if not names:
            raise PaceError(f"{folder} has no folders of scenes")
    else:
        file = file_path("scenes", options.scenes)
        lines = (line.partition("#")[0].strip() for line in read_text(file).splitlines())
        names = list(dict.fromkeys(line for line in lines if line))
        if not names:
            raise PaceError(f"{file} names no scenes: write one a line")
        missing = [name for name in names if not (folder / name).is_dir()]
        if missing:
            raise PaceError(
                f"{folder} lacks {len(missing)} of the {len(names)} scenes of {file}: {', '.join(missing[:3])}"
                + ", ..." * (len(missing) > 3)
            )
    names = sorted(names)
    if options.most_scenes is not None:
        names = names[:: max(1, len(names) // options.most_scenes)][: options.most_scenes]
    return [folder / name for name in names]


def is_scene(folder: Path, dataset: str) -> bool:
    """Whether a folder is a scene itself, and no folder of scenes."""
    files, folders = listed(folder)
    if dataset == SEVEN_SCENES:
        return SPLITS["test"] in files
    if dataset == FOLDER:
        return "clip.json" in files
    return "color" in folders or "sensor_data" in folders or any(".color." in name for name in files)


def check_layout(folder: Path, dataset: str) -> None:
    """Raise `PaceError` for a scene that is one of `folder`, and of no other data set."""
    if dataset != FOLDER and is_scene(folder, FOLDER) and not is_scene(folder, dataset):
        raise PaceError(f"{folder} is no scene of {dataset}, and has a clip.json: take --dataset {FOLDER}")


def scenes_in(folder: Path, dataset: str) -> Iterator[Scene]:
    """What is evaluated in the folder of a scene: of 7-Scenes each test sequence.

    Raises:
        PaceError: a file is missing or broken; the message names the scene.
    """
    with naming(folder.name):
        check_layout(folder, dataset)
        if dataset == SCANNET:
            yield ScanNetScene(folder)
        elif dataset == FOLDER:
            yield FolderScene(folder)
        else:
            for sequence in split_sequences(folder, "test"):
                yield SevenScenesSequence(folder, sequence)


def make_job(scene: Scene, folder: Path, options: Options, frame: FrameSize) -> Job:
    """What is taken of a scene, looked at as far as can be told without reading pictures.

    Raises:
        PaceError: there are too few frames, one does not fit, or there is no mesh; the message names the scene.
    """
    with naming(scene.name):
        numbers = choose_frames(options.protocol, len(scene), options.frames, options.stride)
        if len(numbers) < LEAST_FRAMES:
            raise PaceError(
                f"it gives {len(numbers)} frames, and {LEAST_FRAMES} are the fewest: take another stride, or leave it "
                "out of the list"
            )
        scene.check(numbers, *frame)
        mesh = None
        if options.protocol == PUBLISHED:
            place = folder if options.meshes is None else file_path("meshes", options.meshes) / scene.name
            mesh = place / f"{scene.name}_vh_clean_2.ply"
            if not mesh.is_file():
                raise PaceError(
                    f"{mesh} does not exist, with which the published protocol compares points: give the folder of "
                    f"meshes, or take the protocol {CORRECTED}"
                )
        return Job(scene, numbers, mesh)
