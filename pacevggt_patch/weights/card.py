"""Share pace weights on the Hugging Face Hub: the file and a model card that says what it is."""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError

from ..config import GLOBAL
from ..errors import WeightsError, first_line
from .hub import HUB_FILE, HUB_ID, http_status
from .pace import PaceWeights

CARD_FILE = "README.md"


def push(file: str | PathLike[str], repo: str, revision: str | None = None, *, private: bool = False) -> str:
    """Upload a pace weight file and its model card in one commit.

    The Hub's environment applies (HF_TOKEN, HF_ENDPOINT), and what `hf auth login` stored.

    Args:
        file: a pace weight file; it is read first, so that nothing broken is uploaded.
        repo: "user/name" of a model repository, made if it is not there.
        revision: branch; None is main.
        private: whether a repository that is made can be seen by its owner only.

    Returns:
        The commit; `accelerate(model, weights="user/name@commit")` takes exactly these weights.

    Raises:
        WeightsError: the file is no pace weight file, `repo` is no id, or the upload failed, with the reason.
    """
    if not is_repository(repo):
        raise WeightsError(f'the repository must be "user/name", got {repo!r}')
    file = Path(os.path.expanduser(file))
    weights = PaceWeights.load(file)
    operations = [
        CommitOperationAdd(HUB_FILE, str(file)),
        CommitOperationAdd(CARD_FILE, model_card(weights, repo, revision).encode(errors="replace")),
    ]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message="Pace weights", revision=revision)
    except HFValidationError as error:
        raise WeightsError(f"{repo} is not a valid Hub id: {error}") from error
    except Exception as error:  # of the client and its HTTP library, which differs between its versions
        reason = first_line(error)
        if http_status(error) in (401, 403):
            reason = "the Hub does not let you: log in with `hf auth login` or set HF_TOKEN to a token that may write"
        raise WeightsError(f"{file} can't be uploaded to {repo}: {reason}") from error
    return done.oid


def model_card(weights: PaceWeights, repo: str, revision: str | None = None) -> str:
    """The card of a repository of pace weights, in Markdown: use, backbone, figures, settings.

    Args:
        weights: what is in it.
        repo: "user/name".
        revision: the branch that it is for; None is main.
    """
    training = weights.training
    backbone = str(training.get("backbone", ""))
    header = [
        "---",
        "library_name: pacevggt-patch",
        "tags:",
        f"- {weights.backbone.family}",
        "- token-pruning",
        "- 3d-reconstruction",
    ]
    if is_hub_id(backbone):
        header.append(f"base_model: {backbone}")
    prints = ", ".join(f"{dtype} `{value[:12]}`" for dtype, value in weights.fingerprints.items())
    facts = [
        f"- {backbone or 'name not recorded'}: {weights.backbone}",
        f"- fingerprints: {prints}; another checkpoint is refused",
    ]
    if weights.keep_ratios:
        facts.append(f"- made for keep ratios {', '.join(f'{ratio:g}' for ratio in weights.keep_ratios)}")
    name = "VGGT" if weights.backbone.family == "vggt" else f"model of the family {weights.backbone.family}"
    source = repo if revision is None else f"{repo}@{revision}"
    table = figures(training.get("checks"))
    notes = {name: value for name, value in training.items() if name != "checks" or not table}
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# {repo}",
            "",
            f"Pace weights for {weights.mode} pruning: {contents(weights)}.",
            f"They make a {name} faster with pacevggt-patch. The model itself is not in here, and stays as it is.",
            "",
            "```python",
            *snippet(backbone, source, name),
            "```",
            "",
            "## Model",
            "",
            *facts,
            "",
            *table,
            "## How they were made",
            "",
            f"pacevggt-patch {weights.library_version}, without labels: the unpruned model is the teacher.",
            "",
            "```json",
            json.dumps(notes, indent=1),
            "```",
            "",
        ]
    )


def snippet(backbone: str, source: str, name: str = "VGGT") -> list[str]:
    """Lines of Python that accelerate a model with weights; they run as they are where the model has a name.

    Args:
        backbone: what `load_backbone` was asked for, or "".
        source: of the weights, as `accelerate` takes it.
        name: what a model of the family is called.
    """
    if backbone == "mini":
        load = ["from pacevggt_patch.mini import build_mini", "", "model = build_mini()"]
    elif is_hub_id(backbone):
        load = ["from vggt.models.vggt import VGGT", "", f'model = VGGT.from_pretrained("{backbone}").eval()']
    else:
        load = ["", f"# model: your {name} with the checkpoint below"]
    return [
        "import pacevggt_patch",
        *load,
        f'pacevggt_patch.accelerate(model, keep_ratio=0.3, weights="{source}")',
    ]


def contents(weights: PaceWeights) -> str:
    """What pace weights hold, in words."""
    modules = weights.modules()
    names = [name.replace("_", " ") for name in modules]
    if weights.mode == GLOBAL:
        count = len(weights.full_heads)
        names.insert(0, f"{count} full-attention head{'s' * (count != 1)}")
    parameters = sum(p.numel() for p in modules.parameters())
    return ", ".join(names) + (f", {parameters:,d} parameters" if parameters else "")


def figures(checks: Any) -> list[str]:
    """A table of what each stage of training gave; empty where that is not known, or noted in another form."""
    try:
        rows = [
            f"| {ratio} | {check['stage']} | " + " | ".join(cells(check["ratios"][ratio])) + " |"
            for ratio in checks[0]["ratios"]
            for check in checks
        ]
    except (LookupError, TypeError, ValueError, OverflowError):
        return []
    return [
        "## Figures",
        "",
        "Difference from the unpruned model, on clips that no training step drew: relative rotation and translation",
        "direction (degrees, medians over frame pairs), depth and dense tokens (relative).",
        "",
        "| keep ratio | stage | rotation | direction | depth | tokens |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def cells(row: dict[str, float]) -> list[str]:
    digits = {"rotation_deg": 2, "direction_deg": 1, "depth": 4, "tokens": 3}
    return [f"{row[key]:.{places}f}" if key in row else "-" for key, places in digits.items()]


def is_hub_id(name: str) -> bool:
    """Whether a backbone's name is a Hub id rather than "mini" or a path."""
    return is_repository(name) and not name.startswith(".") and not Path(name).suffix


def is_repository(name: Any) -> bool:
    """Whether something is "user/name", without a revision."""
    match = HUB_ID.fullmatch(name) if isinstance(name, str) else None
    return match is not None and match["revision"] is None
