"""Trained weights of scorer, merge, restoration and adaptation: save, load from file or Hub, match with a backbone."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from ..errors import WeightsError
from ..hosts.vggt import BackboneSpec, Host, block_shapes, find_host, fingerprints, spec
from ..method.block_deltas import BlockAdaptation
from ..method.full_heads import Heads
from ..method.merging import MergeAdapter
from ..method.restoration import FeatureGuidedRestoration
from ..method.scoring import TokenScorer
from ..version import __version__
from . import tensorfile
from .bundled import bundled_files

KIND = "pace weights"
FORMAT = 5  # 1 had no adaptation, 2 none for dense frames, 3 no strength of the adaptation, 4 neither distinctness nor
# matching heads
OLD_STRENGTH = 0.6  # `full_strength` of older files, whose changes faded in a line from there
HUB_FILE = "pace.safetensors"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?")
ACCEPTED = (
    'weights must be "auto", None, a path to a .safetensors file, a Hugging Face Hub id "user/repo[@revision]", '
    "or PaceWeights"
)


@dataclass(eq=False)
class PaceWeights:
    """What makes the accelerated model better than training-free: a trained scorer, merge, restoration and adaptation.

    Weights are for frame blocks on the kept tokens, or for frame blocks on all of them (`dense_frames`), where there is
    nothing to merge and next to nothing to restore.

    Attributes:
        scorer: learned saliency of patch tokens.
        merge: learned residual of the tokens that enter attention; None for dense frames.
        restoration: learned residual of the dense tokens; None for dense frames.
        adaptation: learned changes of the attention blocks.
        backbone: dimensions of the backbone that it was trained for.
        fingerprints: dtype name -> fingerprint of that backbone cast to this dtype (see `backbone.fingerprints`).
        keep_ratios: keep ratios that it was trained for.
        training: how it was trained, as JSON values.
        library_version: version of this package that made it.
        source: where it came from, in words.
        matching: (block, head) of the heads of global attention that see all tokens with dense frames, see
            `matching.MatchingHeads`; none for the other setting.
    """

    scorer: TokenScorer
    merge: MergeAdapter | None
    restoration: FeatureGuidedRestoration | None
    adaptation: BlockAdaptation
    backbone: BackboneSpec
    fingerprints: dict[str, str]
    keep_ratios: tuple[float, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    source: str = "new"
    matching: Heads = ()

    @classmethod
    @torch.inference_mode(False)  # parameters made in inference mode could never be trained
    def new(
        cls,
        model: nn.Module,
        *,
        dense_frames: bool = False,
        keep_ratios: Sequence[float] = (),
        training: dict[str, Any] | None = None,
    ) -> PaceWeights:
        """Untrained weights that fit a VGGT, in float32 on its device. They change nothing until they are trained.

        The same every time; the global random state is left alone.

        Raises:
            UnsupportedModelError: `model` is not a VGGT.
        """
        host = find_host(model)
        backbone = spec(host)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.random.default_generator.manual_seed(0)
            scorer = TokenScorer(backbone.embed_dim)
            merge = None if dense_frames else MergeAdapter(backbone.embed_dim).eval()
            restoration = (
                None
                if dense_frames
                else FeatureGuidedRestoration(backbone.embed_dim, backbone.cached_layers).eval()
            )
            adaptation = BlockAdaptation(block_shapes(host.aggregator))
        weights = cls(
            scorer.eval(),
            merge,
            restoration,
            adaptation.eval(),
            backbone,
            fingerprints(host),
            tuple(float(ratio) for ratio in keep_ratios),
            training=dict(training or {}),
        )
        aggregator: Any = host.aggregator
        return weights.to(aggregator.camera_token.device)

    def save(self, path: str | PathLike[str], *, eight_bits: bool = False, rank: int | None = None) -> None:
        """Write one safetensors file with everything else as JSON in its metadata, at once or not at all.

        Args:
            path: of the file.
            eight_bits: write matrices in 8 bits, see `tensorfile.in_8_bits`, which rounds; else float32.
            rank: write the changes of matrices as the nearest ones of this rank; None as they are.

        Raises:
            WeightsError: no such folder, NaN or infinity, `training` is not JSON, a rank out of range, or the write
                failed.
        """
        if rank is not None:
            most = self.adaptation.rank
            if type(rank) is not int or not 1 <= rank <= most:
                raise WeightsError(f"rank must be a whole number from 1 to {most}, got {rank!r}")
            replace(self, adaptation=self.adaptation.nearest(rank)).save(path, eight_bits=eight_bits)
            return
        tensors = {name: tensor.float() for name, tensor in self.modules().state_dict().items()}
        fields = {
            "library_version": self.library_version,
            "backbone": self.backbone.to_dict(),
            "hidden_dims": {
                "scorer": self.scorer.hidden.weight.shape[0],
                "merge": None if self.merge is None else self.merge.out.weight.shape[1],
                "restoration": (
                    None if self.dense_frames else tensors["restoration.hidden.0.weight"].shape[0]
                ),
                "adaptation": self.adaptation.rank,
            },
            "adapted": self.adaptation.shapes(),
            "full_strength": self.adaptation.full_strength,
            "distinctness": self.scorer.distinctness_weight,
            "dense_frames": self.dense_frames,
            "fingerprints": self.fingerprints,
            "keep_ratios": list(self.keep_ratios),
            "matching_heads": [list(head) for head in self.matching],
            "training": self.training,
        }
        tensors = tensorfile.in_8_bits(tensors) if eight_bits else tensors
        tensorfile.write(path, tensors, KIND, FORMAT, fields)

    @classmethod
    def load(cls, source: str | PathLike[str]) -> PaceWeights:
        """Read weights from a file, or from the Hugging Face Hub (through its cache).

        Args:
            source: path, or Hub id "user/repo[@revision]" of a repository that holds `pace.safetensors`.

        Returns:
            The weights in evaluation mode, float32, on the CPU.

        Raises:
            WeightsError: `source` is neither, can't be had, is damaged, or needs a newer version of this package.
        """
        if isinstance(source, PathLike) or (isinstance(source, str) and _is_path(source)):
            return _read(Path(source).expanduser(), str(source))
        match = HUB_ID.fullmatch(source) if isinstance(source, str) else None
        if match is None:
            raise WeightsError(f"{ACCEPTED}, got {source!r}")
        repo, revision = match["repo"], match["revision"]
        return _read(_download(repo, revision), f"{repo}@{revision or 'main'}")

    @property
    def dense_frames(self) -> bool:
        """Whether they are for frame blocks on all patch tokens."""
        return self.restoration is None

    def matching_shares(self) -> list[float]:
        """For each global block with matching heads, the share of its heads that they are."""
        counts = Counter(block for block, _ in self.matching)
        # Of a fork whose attention does not tell its number of heads, the most that it can be.
        return [count / (self.backbone.num_heads or count) for count in counts.values()]

    def check(self, host: Host, dense_frames: bool = False) -> None:
        """Check that these weights were trained for this backbone and setting.

        A float32 backbone has a fingerprint for each dtype that it can be cast to, so weights and host belong
        together if the fingerprints of any dtype that both know agree.

        Raises:
            WeightsError: names both sides.
        """
        self.check_setting(dense_frames)
        mine, theirs = self.backbone, spec(host)
        if not _dimensions_fit(mine, theirs, bool(host.dense_heads)):
            raise WeightsError(
                f"pace weights {self.source} are for a VGGT with {mine}; this model has {theirs}"
            )
        shapes = block_shapes(host.aggregator)
        other = [name for name, shape in self.adaptation.shapes().items() if shapes.get(name) != shape]
        if other:
            raise WeightsError(
                f"pace weights {self.source} change {other[0]} and {len(other) - 1} other parameters that this model's "
                "attention blocks do not have in that shape"
            )
        if self.matching and not dense_frames:
            raise WeightsError(
                f"pace weights {self.source} have matching heads, which are for dense_frames=True alone"
            )
        for block, head in self.matching:
            # A fork whose attention does not tell its number of heads has 0.
            if not (0 <= block < theirs.depth and 0 <= head < (theirs.num_heads or head + 1)):
                raise WeightsError(
                    f"pace weights {self.source} let head {head} of global block {block} see all tokens, which this "
                    f"model, of {theirs.depth} blocks of {theirs.num_heads} heads, does not have"
                )
        known = fingerprints(host)
        if not self.fingerprints.keys() & known.keys():
            raise WeightsError(
                f"pace weights {self.source} were trained on a {'/'.join(self.fingerprints)} model, this model is "
                f"{'/'.join(known)}, so whether they belong together can't be told: load the model in the first dtype"
            )
        if not _same_backbone(self.fingerprints, known):
            dtype = min(self.fingerprints.keys() & known.keys())
            raise WeightsError(
                f"pace weights {self.source} were trained for another checkpoint (fingerprint "
                f"{self.fingerprints[dtype][:12]}) than this model's ({known[dtype][:12]}): train weights for this "
                "one, or pass weights=None"
            )

    def check_setting(self, dense_frames: bool) -> None:
        """Check that these weights were trained for this setting, which takes no model.

        Raises:
            WeightsError: they were not.
        """
        if self.dense_frames != dense_frames:
            raise WeightsError(
                f"pace weights {self.source} were trained for dense_frames={self.dense_frames}: pass that, or "
                "other weights"
            )

    def to(self, device: torch.device | str) -> PaceWeights:
        """Move the modules to a device, in place. Returns itself."""
        device = torch.device(device)
        if self.scorer.out.weight.device != device:
            # Parameters moved in inference mode could never be trained afterwards.
            with torch.inference_mode(False):
                self.modules().to(device)
        return self

    def modules(self) -> nn.ModuleDict:
        """The trained modules by name, the modules themselves."""
        names = ("scorer", "merge", "restoration", "adaptation")
        modules = {name: getattr(self, name) for name in names}
        return nn.ModuleDict({name: module for name, module in modules.items() if module is not None})

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.modules().parameters())
        # Gradient steps name the least and the largest one, a calibration all that it was fitted for.
        between = " to " if self.training.get("steps") else ", "
        ratios = between.join(f"{ratio:g}" for ratio in self.keep_ratios)
        steps = self.training.get("steps", 0 if self.matching else None)  # matching heads take none
        how = "calibrated" if steps == 0 else "trained"
        trained = f"{how} for keep ratios {ratios}" if ratios else "no keep ratios recorded"
        trained += " with dense frames" if self.dense_frames else ""
        if self.matching:
            trained += f", {len(self.matching)} matching head{'s' * (len(self.matching) > 1)}"
        return f"{self.source} ({trained}; {parameters:,d} parameters; pacevggt-patch {self.library_version})"


def resolve(
    weights: str | PathLike[str] | PaceWeights | None, host: Host, dense_frames: bool = False
) -> PaceWeights | None:
    """The weights that `accelerate` was asked for, checked against the host; None is training-free.

    Args:
        weights: None, "auto" (bundled weights of this backbone, else None with a warning), `PaceWeights`, a path, or a
            Hub id "user/repo[@revision]".
        host: the model's parts.
        dense_frames: whether frame blocks keep all patch tokens.

    Raises:
        WeightsError: anything else, or weights that can't be had, are damaged, or do not fit.
    """
    if weights is None:
        return None
    if isinstance(weights, str) and weights == "auto":
        found = _bundled(host, dense_frames)
        if found is None:
            setting = " and dense_frames=True" if dense_frames else ""
            warnings.warn(
                f"no pace weights are bundled for this checkpoint{setting}, so it runs training-free: pass "
                'weights=PATH or weights="user/repo" to use trained ones, or weights=None to choose training-free '
                "without this warning",
                UserWarning,
                stacklevel=3,  # past accelerate(), to the line that called it
            )
        return found
    chosen = weights if isinstance(weights, PaceWeights) else PaceWeights.load(weights)
    chosen.check(host, dense_frames)
    return chosen


def _bundled(host: Host, dense_frames: bool) -> PaceWeights | None:
    known = fingerprints(host)
    for path in bundled_files("pace-*.safetensors"):
        fields = tensorfile.read_metadata(path, KIND, FORMAT)
        if fields.get("dense_frames", False) == dense_frames and _same_backbone(
            fields.get("fingerprints", {}), known
        ):
            weights = _read(path, f"bundled {path.stem}")
            weights.check(host, dense_frames)
            return weights
    return None


@torch.inference_mode(False)
def _read(path: Path, source: str) -> PaceWeights:
    fields = tensorfile.read_metadata(path, KIND, FORMAT)
    try:
        layers = tuple(fields["backbone"].pop("cached_layers"))
        backbone = BackboneSpec(**fields["backbone"], cached_layers=layers)
        hidden = fields["hidden_dims"]
        # Nothing is allocated or initialised before the tensors of the file are known to fit.
        with torch.device("meta"):
            distinct = fields["distinctness"] if fields["format"] > 4 else 0.0
            scorer = TokenScorer(backbone.embed_dim, hidden["scorer"], float(distinct))
            dense_frames = fields["format"] > 2 and fields["dense_frames"]
            full_strength = fields["full_strength"] if fields["format"] > 3 else OLD_STRENGTH
            heads = _heads(fields["matching_heads"]) if fields["format"] > 4 else ()
            merge = None if dense_frames else MergeAdapter(backbone.embed_dim, hidden["merge"]).eval()
            restoration = (
                None
                if dense_frames
                else FeatureGuidedRestoration(backbone.embed_dim, layers, hidden["restoration"]).eval()
            )
            adapted, rank = (fields["adapted"], hidden["adaptation"]) if fields["format"] > 1 else ({}, 0)
            shapes = {name: tuple(shape) for name, shape in adapted.items()}
            adaptation = BlockAdaptation(shapes, rank, float(full_strength))
        weights = PaceWeights(
            scorer.eval(),
            merge,
            restoration,
            adaptation.eval(),
            backbone,
            dict(fields["fingerprints"]),
            tuple(float(ratio) for ratio in fields["keep_ratios"]),
            dict(fields["training"]),
            str(fields["library_version"]),
            source,
            heads,
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"{path} has damaged metadata: {type(error).__name__}: {error}") from error
    tensors = tensorfile.read_tensors(path, KIND)
    modules = weights.modules()
    tensorfile.check_tensors(path, tensors, modules.state_dict())
    modules.load_state_dict(tensors, assign=True)
    return weights


def _heads(pairs: Any) -> Heads:
    """[[block, head], ...] of a file, checked."""
    heads = tuple((block, head) for block, head in pairs)
    if not all(type(number) is int and number >= 0 for pair in heads for number in pair):
        raise ValueError(f"matching_heads must be pairs of whole numbers from 0 on, got {pairs}")
    if len(set(heads)) < len(heads):
        raise ValueError(f"matching_heads must differ, got {pairs}")
    return heads


def _dimensions_fit(mine: BackboneSpec, theirs: BackboneSpec, has_dense_heads: bool) -> bool:
    """Whether weights for `mine` can serve `theirs`: of the layers, only those that dense heads read matter."""
    same = all(getattr(mine, name) == getattr(theirs, name) for name in ("embed_dim", "depth", "patch_size"))
    same = same and mine.special_tokens == theirs.special_tokens
    # A fork whose attention does not tell its number of heads has 0.
    same = same and (mine.num_heads == theirs.num_heads or 0 in (mine.num_heads, theirs.num_heads))
    return same and (not has_dense_heads or set(theirs.cached_layers) <= set(mine.cached_layers))


def _same_backbone(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    return any(mine[dtype] == theirs[dtype] for dtype in mine.keys() & theirs.keys())


def _is_path(source: str) -> bool:
    return source.endswith(".safetensors") or source.startswith((".", "~", "/")) or os.path.exists(source)


def _download(repo: str, revision: str | None) -> Path:
    """Path of `pace.safetensors` in the Hub cache, fetched if need be.

    Raises:
        WeightsError: one sentence that says what to do.
    """
    name = f"{repo}@{revision}" if revision else repo
    try:
        return Path(hf_hub_download(repo, HUB_FILE, revision=revision))
    except GatedRepoError as error:
        problem = (
            f"{repo} is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        )
        raise WeightsError(problem) from error
    except RepositoryNotFoundError as error:
        problem = (
            f"{repo} is not on the Hugging Face Hub, or it is private: check the id, or log in with `hf auth login` "
            "or set HF_TOKEN"
        )
        raise WeightsError(problem) from error
    except RevisionNotFoundError as error:
        raise WeightsError(
            f"{repo} has no revision {revision}: check the branch, tag or commit after the @"
        ) from error
    except LocalEntryNotFoundError as error:  # before EntryNotFoundError, which it is one of
        status = _http_status(error.__cause__)
        if constants.HF_HUB_OFFLINE:
            problem = f"{name} is not in the Hub cache and HF_HUB_OFFLINE is set: unset it once to download {HUB_FILE}"
        elif status is not None:
            problem = (
                f"{name} is not in the Hub cache and the Hub answers with HTTP status {status}: try again later, or "
                "pass a path to the file"
            )
        else:
            problem = (
                f"{name} is not in the Hub cache and the Hub can't be reached: check the network and HF_ENDPOINT, or "
                "pass a path to the file"
            )
        raise WeightsError(problem) from error
    except EntryNotFoundError as error:
        problem = f"{name} holds no {HUB_FILE}, so it is not a repository of pace weights: check the id"
        raise WeightsError(problem) from error
    except HFValidationError as error:
        raise WeightsError(f"{name} is not a valid Hub id: {error}") from error
    except Exception as error:  # of the client's HTTP library, which differs between its versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if _http_status(error) == 401:
            reason = "the Hub rejects your token, log in with `hf auth login` or fix HF_TOKEN"
        raise WeightsError(f"{name} can't be downloaded: {reason}") from error


def _http_status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
