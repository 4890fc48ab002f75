"""Share pace weights on the Hugging Face Hub: the file and a model card that says what it is."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError

from ..errors import WeightsError
from .hub import HUB_FILE
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
        WeightsError: the file is no pace weight file, or the upload failed, with the reason.
    """
    file = Path(file).expanduser()
    weights = PaceWeights.load(file)
    operations = [
        CommitOperationAdd(HUB_FILE, str(file)),
        CommitOperationAdd(CARD_FILE, model_card(weights, repo).encode()),
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
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if status in (401, 403):
            reason = "the Hub does not let you: log in with `hf auth login` or set HF_TOKEN to a token that may write"
        raise WeightsError(f"{file} can't be uploaded to {repo}: {reason}") from error
    return done.oid


def model_card(weights: PaceWeights, repo: str) -> str:
    """The card of a repository of pace weights, in Markdown: use, backbone, figures, settings."""
    training = weights.training
    header = [
        "---",
        "library_name: pacevggt-patch",
        "tags:",
        "- vggt",
        "- token-pruning",
        "- 3d-reconstruction",
    ]
    backbone = str(training.get("backbone", ""))
    if is_hub_id(backbone):
        header.append(f"base_model: {backbone}")
    ratios = ", ".join(f"{ratio:g}" for ratio in weights.keep_ratios) or "not recorded"
    parameters = sum(p.numel() for p in weights.modules().parameters())
    prints = ", ".join(f"{dtype} `{value[:12]}`" for dtype, value in weights.fingerprints.items())
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# {repo}",
            "",
            f"Pace weights for {weights.mode} pruning ({contents(weights)}). They make a VGGT faster with pacevggt-patch.",
            "The backbone itself is not in here, and stays as it is.",
            "",
            "```python",
            "import pacevggt_patch",
            "",
            f'pacevggt_patch.accelerate(model, keep_ratio=0.3, weights="{repo}")',
            "```",
            "",
            "## Backbone",
            "",
            f"- {backbone or 'not recorded'}: {weights.backbone}",
            f"- fingerprints: {prints}; another checkpoint is refused",
            f"- keep ratios trained for: {ratios}; {parameters:,d} parameters",
            "",
            *figures(training.get("checks")),
            "## Training",
            "",
            f"pacevggt-patch {weights.library_version}; no labels: the unpruned model is the teacher.",
            "",
            "```json",
            json.dumps({k: v for k, v in training.items() if k != "checks"}, indent=1),
            "```",
            "",
        ]
    )


def contents(weights: PaceWeights) -> str:
    """What pace weights hold, in words."""
    names = [name.replace("_", " ") for name in weights.modules()]
    if weights.full_heads:
        names.insert(0, f"{len(weights.full_heads)} full-attention heads")
    return ", ".join(names) or "nothing"


def figures(checks: Any) -> list[str]:
    """A table of what each stage of training gave, if it is known."""
    if not checks:
        return []
    lines = [
        "## Figures",
        "",
        "Difference from the unpruned model, on clips that no training step drew: relative rotation and translation",
        "direction (degrees, medians over frame pairs), depth and dense tokens (relative).",
        "",
        "| keep ratio | stage | rotation | direction | depth | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for ratio in checks[0]["ratios"]:
        for check in checks:
            row = check["ratios"][ratio]
            cells = [
                f"{row[key]:.{digits}f}" if key in row else "-"
                for key, digits in (("rotation_deg", 2), ("direction_deg", 1), ("depth", 4), ("tokens", 3))
            ]
            lines.append(f"| {ratio} | {check['stage']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def is_hub_id(name: str) -> bool:
    """Whether a backbone's name is a Hub id rather than "mini" or a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).suffix
