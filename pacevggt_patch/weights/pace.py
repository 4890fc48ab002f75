"""Pace weights: what was trained or calibrated for one checkpoint; saved, loaded, and matched with a model."""

from __future__ import annotations

import copy
import hashlib
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import several, shown
from ..config import GLOBAL, MODES, PRE_AA, PaceConfig, check_mode
from ..errors import PaceError, UnsupportedModelError, WeightsError, first_line
from ..hosts.base import BackboneSpec, Host, find_host
from ..method.block_deltas import BlockDeltas
from ..method.full_heads import Heads
from ..method.merging import MergeAdapter
from ..method.restoration import FeatureGuidedRestoration
from ..method.scoring import TokenScorer
from ..version import __version__
from . import tensorfile
from .bundled import bundled_files
from .fingerprint import agree, fingerprints
from .hub import HUB_ID, download

KIND, FORMAT = "pace weights", 6
MODULES = ("scorer", "merge", "restoration", "block_deltas")
LARGEST = 2**20  # whole number in metadata
ACCEPTED = (
    'weights must be "auto", None, a path to a .safetensors file, a Hugging Face Hub id "user/repo[@revision]", '
    "or PaceWeights"
)


@dataclass(eq=False)
class PaceWeights:
    """What makes an accelerated model better than training-free.

    Attributes:
        backbone: dimensions of the model they are for.
        fingerprints: dtype name -> fingerprint of that model cast to this dtype, see `weights.fingerprint`.
        mode: "global" or "pre-aa", as in `PaceConfig`.
        full_heads: (block, head) of global attention that see all tokens; of global pruning.
        scorer: learned saliency of patch tokens, or None.
        block_deltas: learned changes of the attention blocks, or None.
        merge: learned residual of the tokens that enter attention; of pre-AA pruning.
        restoration: learned residual of the restored tokens; of pre-AA pruning.
        keep_ratios: keep ratios that they were made for.
        training: how they were made, as JSON values.
        library_version: version of this package that made them.
        source: where they came from, in words.
    """

    backbone: BackboneSpec
    fingerprints: dict[str, str]
    mode: str = GLOBAL
    full_heads: Heads = ()
    scorer: TokenScorer | None = None
    block_deltas: BlockDeltas | None = None
    merge: MergeAdapter | None = None
    restoration: FeatureGuidedRestoration | None = None
    keep_ratios: tuple[float, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    source: str = "made here"

    @classmethod
    @torch.inference_mode(False)  # parameters made in inference mode could never be trained
    def new(
        cls,
        model: nn.Module,
        *,
        mode: str = GLOBAL,
        keep_ratios: Sequence[float] = (),
        training: dict[str, Any] | None = None,
    ) -> PaceWeights:
        """Untrained weights that fit a model, in float32 on its device. They change nothing until they are trained.

        They are the same every time, and the global random state is left alone.

        Raises:
            UnsupportedModelError: `model` can't be accelerated, or its parameters hold no values.
            PaceError: an argument is of another type or out of range.
        """
        check_mode(mode)
        if not isinstance(training, Mapping | None):
            raise PaceError(f"training must be a dictionary, got {shown(training)}")
        ratios = [PaceConfig(ratio).keep_ratio for ratio in several("keep_ratios", keep_ratios)]
        host = find_host(model)
        check_values(host)
        backbone = host.spec()
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.random.default_generator.manual_seed(0)
            scorer = TokenScorer(backbone.embed_dim)
            merge = restoration = None
            if mode == PRE_AA:
                merge = MergeAdapter(backbone.embed_dim).eval()
                restoration = FeatureGuidedRestoration(backbone.embed_dim, backbone.cached_layers).eval()
            deltas = BlockDeltas(host.block_shapes())
        weights = cls(
            backbone,
            fingerprints(host),
            mode,
            scorer=scorer.eval(),
            block_deltas=deltas.eval(),
            merge=merge,
            restoration=restoration,
            keep_ratios=tuple(ratios),
            training=dict(training or {}),
        )
        return weights.to(host.reference.device)

    @classmethod
    def of_heads(
        cls, host: Host, heads: Heads, training: dict[str, Any], source: str = "made here"
    ) -> PaceWeights:
        """Weights of global pruning that say which heads see all tokens, and nothing else."""
        return cls(host.spec(), fingerprints(host), GLOBAL, heads, training=training, source=source)

    def save(self, path: str | PathLike[str], *, eight_bits: bool = False, rank: int | None = None) -> None:
        """Write one safetensors file, whole or not at all. What is no tensor is JSON in its metadata.

        Args:
            path: of the file.
            eight_bits: write matrices in 8 bits, which rounds (`tensorfile.in_8_bits`); else in float32.
            rank: write the nearest block deltas of this rank. None writes them as they are.

        Raises:
            WeightsError: there is no such folder, a value is out of range, NaN or infinite, `training` is not JSON, or
                writing failed.
        """
        if rank is not None:
            most = 0 if self.block_deltas is None else self.block_deltas.rank
            if type(rank) is not int or not 1 <= rank <= most or self.block_deltas is None:
                raise WeightsError(f"rank must be a whole number from 1 to {most}, got {rank!r}")
            replace(self, block_deltas=self.block_deltas.nearest(rank)).save(path, eight_bits=eight_bits)
            return
        tensors = {name: tensor.float() for name, tensor in self.modules().state_dict().items()}
        fields = {
            "library_version": self.library_version,
            "backbone": self.backbone.to_dict(),
            "fingerprints": self.fingerprints,
            "mode": self.mode,
            "full_heads": [list(head) for head in self.full_heads],
            "modules": self.sizes(),
            "keep_ratios": list(self.keep_ratios),
            "training": self.training,
        }
        _check_fields(fields, f"can't save {KIND} to {path}")
        tensors = tensorfile.in_8_bits(tensors) if eight_bits else tensors
        tensorfile.write(path, tensors, KIND, FORMAT, fields)

    def sizes(self) -> dict[str, dict[str, Any]]:
        """What is needed to build each module that there is, as JSON values."""
        found: dict[str, dict[str, Any]] = {}
        if self.scorer is not None:
            found["scorer"] = {
                "hidden_dim": self.scorer.hidden.weight.shape[0],
                "distinctness_weight": self.scorer.distinctness_weight,
            }
        if self.merge is not None:
            found["merge"] = {"hidden_dim": self.merge.out.weight.shape[1]}
        if self.restoration is not None:
            found["restoration"] = {"hidden_dim": self.restoration.state_dict()["hidden.0.weight"].shape[0]}
        deltas = self.block_deltas
        if deltas is not None:
            found["block_deltas"] = {
                "shapes": deltas.shapes(),
                "rank": deltas.rank,
                "full_strength": deltas.full_strength,
            }
        return found

    @classmethod
    def load(cls, source: str | PathLike[str]) -> PaceWeights:
        """Read weights from a file, or from the Hugging Face Hub (through its cache).

        Args:
            source: path, or Hub id "user/repo[@revision]" of a repository that holds `pace.safetensors`.

        Returns:
            The weights in evaluation mode, float32, on the CPU.

        Raises:
            WeightsError: `source` is no path or id, can't be had, is damaged, or is of another format.
        """
        return load(source)

    def full_head_shares(self) -> list[float]:
        """For each global block with full-attention heads, the share of its heads that they are."""
        counts = Counter(block for block, _ in self.full_heads)
        # Of a block that does not tell its number of heads, the most that it can be.
        return [count / (self.backbone.num_heads or count) for count in counts.values()]

    def check(self, host: Host) -> None:
        """Check that these weights were made for this model.

        Raises:
            WeightsError: names both sides.
        """
        mine, theirs = self.backbone, host.spec()
        if not _dimensions_fit(mine, theirs, bool(host.dense_heads)):
            raise WeightsError(
                f"pace weights {self.source} are for a {mine.family} with {mine}; this model is a {theirs.family} with "
                f"{theirs}"
            )
        shapes = host.block_shapes()
        changed = {} if self.block_deltas is None else self.block_deltas.shapes()
        other = [name for name, shape in changed.items() if shapes.get(name) != shape]
        if other:
            raise WeightsError(
                f"pace weights {self.source} change {other[0]} and {len(other) - 1} other parameters that this model's "
                "attention blocks do not have in that shape"
            )
        blocks = host.indices("global")
        for block, head in self.full_heads:
            # A block that does not tell its number of heads has 0.
            if not (block in blocks and 0 <= head < (theirs.num_heads or head + 1)):
                raise WeightsError(
                    f"pace weights {self.source} let head {head} of global block {block} see all tokens, which this "
                    f"model, of {len(blocks)} blocks of {theirs.num_heads} heads, does not have"
                )
        known = fingerprints(host)
        if not self.fingerprints.keys() & known.keys():
            raise WeightsError(
                f"pace weights {self.source} were made for a {'/'.join(self.fingerprints)} model, this model is "
                f"{'/'.join(known)}, so whether they belong together can't be told: load the model in the first dtype"
            )
        if not agree(self.fingerprints, known):
            dtype = min(self.fingerprints.keys() & known.keys())
            raise WeightsError(
                f"pace weights {self.source} were made for another checkpoint (fingerprint "
                f"{self.fingerprints[dtype][:12]}) than this model's ({known[dtype][:12]}): make weights for this "
                'one, or pass weights="auto"'
            )

    def copy_for(self, host: Host) -> PaceWeights:
        """A copy on the host's device that asks for no gradients; the user's object is left alone."""
        # Parameters made in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            modules = {name: copy.deepcopy(module) for name, module in self.modules().items()}
            for module in modules.values():
                module.requires_grad_(False).eval().to(host.reference.device)
        return replace(self, **modules)

    def to(self, device: torch.device | str) -> PaceWeights:
        """Move the modules to a device, in place. Returns itself."""
        # Parameters moved in inference mode could never be trained afterwards.
        with torch.inference_mode(False):
            self.modules().to(device)
        return self

    def digest(self) -> str:
        """SHA-256 over what they do: which heads see all tokens, and the values of all modules."""
        digest = hashlib.sha256(repr((self.mode, self.full_heads, self.sizes())).encode())
        for name, tensor in self.modules().state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device | None:
        """Where the modules are; None without modules."""
        return next((p.device for p in self.modules().parameters()), None)

    def modules(self) -> nn.ModuleDict:
        """The modules that there are by name, the modules themselves."""
        modules = {name: getattr(self, name) for name in MODULES}
        return nn.ModuleDict({name: module for name, module in modules.items() if module is not None})

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.modules().parameters())
        steps = self.training.get("steps", 0)
        how = "trained" if steps else "calibrated"
        if self.keep_ratios:
            # Gradient steps name the least and the largest one, a calibration all that it was fitted for.
            how += " for keep ratios " + (" to " if steps else ", ").join(
                f"{ratio:g}" for ratio in self.keep_ratios
            )
        parts = [f"{self.mode} pruning, {how}"]
        if self.mode == GLOBAL:
            parts.append(f"{len(self.full_heads)} full-attention head{'s' * (len(self.full_heads) != 1)}")
        if parameters:
            parts.append(f"{parameters:,d} parameters")
        return f"{self.source} ({'; '.join(parts)}; pacevggt-patch {self.library_version})"


def check_values(host: Host) -> None:
    """Raise UnsupportedModelError for parameters on the meta device, whose checkpoint can't be told."""
    if any(tensor.is_meta for tensor in host.fingerprint_tensors()):
        raise UnsupportedModelError(
            "the model's parameters are on the meta device or offloaded, so which checkpoint they are can't be told: "
            "load the model whole on its device, or pass weights=None"
        )


def bundled_for(host: Host, mode: str) -> PaceWeights | None:
    """The bundled weights of this checkpoint and mode, or None."""
    known = fingerprints(host)
    for path in bundled_files("pace-*.safetensors"):
        fields = tensorfile.read_metadata(path, KIND, FORMAT, FORMAT)
        if fields.get("mode") == mode and agree(fields.get("fingerprints", {}), known):
            return read(path, f"bundled {path.stem}", host)
    return None


def load(source: Any, host: Host | None = None) -> PaceWeights:
    """`PaceWeights.load`; for a host weights that are not its own are refused before their tensors are read."""
    if isinstance(source, PathLike) or (isinstance(source, str) and _is_path(source)):
        return read(Path(os.path.expanduser(source)), str(source), host)
    match = HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if match is None:
        raise WeightsError(f"{ACCEPTED}, got {source!r}")
    repo, revision = match["repo"], match["revision"]
    return read(download(repo, revision), f"{repo}@{revision or 'main'}", host)


@torch.inference_mode(False)
def read(path: Path, source: str, host: Host | None = None) -> PaceWeights:
    """The weights in a file.

    Raises:
        WeightsError: there is none, it is damaged, or it is not for the host that is given.
    """
    file = tensorfile.WeightFile(path, KIND)
    fields = file.fields(FORMAT, FORMAT)
    _check_fields(fields, f"{path} has damaged metadata")
    try:
        weights = _described(fields, source)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} has damaged metadata: {first_line(error)}") from error
    modules = weights.modules()
    tensorfile.check_tensors(path, file.layout(), modules.state_dict())
    if host is not None:
        weights.check(host)
    modules.load_state_dict(file.read(), assign=True)
    return weights


def _described(fields: dict[str, Any], source: str) -> PaceWeights:
    """The weights that metadata tells of, with modules on the meta device."""
    backbone = dict(fields["backbone"])
    layers = tuple(backbone.pop("cached_layers"))
    spec = BackboneSpec(**backbone, cached_layers=layers)
    with torch.device("meta"):
        modules: dict[str, Any] = {
            name: _module(name, spec, size).eval() for name, size in fields["modules"].items()
        }
    return PaceWeights(
        spec,
        fields["fingerprints"],
        fields["mode"],
        tuple((block, head) for block, head in fields["full_heads"]),
        keep_ratios=tuple(map(float, fields["keep_ratios"])),
        training=fields["training"],
        library_version=fields["library_version"],
        source=source,
        **modules,
    )


def _module(name: str, spec: BackboneSpec, size: dict[str, Any]) -> nn.Module:
    if name == "block_deltas":
        return BlockDeltas(size["shapes"], size["rank"], float(size["full_strength"]))
    if name == "scorer":
        return TokenScorer(spec.embed_dim, size["hidden_dim"], float(size["distinctness_weight"]))
    if name == "merge":
        return MergeAdapter(spec.embed_dim, size["hidden_dim"])
    return FeatureGuidedRestoration(spec.embed_dim, spec.cached_layers, size["hidden_dim"])


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _size(value: Any) -> bool:
    return _count(value) and value > 0


def _share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _items(values: Any, fits: Callable[[Any], bool], least: int = 0, most: int = LARGEST) -> bool:
    return isinstance(values, (list, tuple)) and least <= len(values) <= most and all(map(fits, values))


# Whether a value of the metadata is what it must be. Lists are short enough for modules to be made of them in a second.
FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("backbone.embed_dim", "backbone.depth", "backbone.patch_size"), _size),
    **dict.fromkeys(("backbone.num_heads", "backbone.special_tokens"), _count),
    "backbone.cached_layers": lambda layers: _items(layers, _count, 0, 256) and len({*layers}) == len(layers),
    **dict.fromkeys(("backbone.family", "library_version"), _text),
    "fingerprints": lambda prints: isinstance(prints, dict) and _items([*prints, *prints.values()], _text, 2),
    "mode": lambda mode: mode in MODES,
    "full_heads": lambda heads: (
        _items(heads, lambda pair: _items(pair, _count, 2, 2)) and len({*map(tuple, heads)}) == len(heads)
    ),
    "keep_ratios": lambda ratios: _items(ratios, lambda ratio: _share(ratio) and ratio > 0),
    "training": lambda training: isinstance(training, dict),
    "modules": lambda modules: isinstance(modules, dict) and {*modules} <= {*MODULES},
    **dict.fromkeys(("modules.scorer.hidden_dim", "modules.restoration.hidden_dim"), _size),
    "modules.merge.hidden_dim": lambda width: _size(width) and width % 4 == 0,  # its heads share it
    "modules.scorer.distinctness_weight": _share,
    "modules.block_deltas.rank": _size,
    "modules.block_deltas.full_strength": _share,
    "modules.block_deltas.shapes": lambda shapes: (
        isinstance(shapes, dict)
        and all("." in name for name in shapes)  # else it may be an attribute of the module
        and _items([*shapes.values()], lambda shape: _items(shape, _size, 1, 2), most=4096)
    ),
}


def _check_fields(fields: dict[str, Any], problem: str) -> None:
    """Check metadata before anything is made of it, or before it is written; WeightsError names the field."""
    for path, fits in FIELDS.items():
        names = path.split(".")
        if names[0] == "modules" and len(names) > 1 and names[1] not in fields["modules"]:
            continue
        value: Any = fields
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if not fits(value):
            shown = "left out" if value is None else reprlib.repr(value)
            raise WeightsError(f"{problem}: {path} can't be {shown}")


def _dimensions_fit(mine: BackboneSpec, theirs: BackboneSpec, has_dense_heads: bool) -> bool:
    """Whether weights for `mine` can serve `theirs`: of the layers, only those that dense heads read matter."""
    names = ("family", "embed_dim", "depth", "patch_size", "special_tokens")
    same = all(getattr(mine, name) == getattr(theirs, name) for name in names)
    # A block that does not tell its number of heads has 0.
    same = same and (mine.num_heads == theirs.num_heads or 0 in (mine.num_heads, theirs.num_heads))
    return same and (not has_dense_heads or set(theirs.cached_layers) <= set(mine.cached_layers))


def _is_path(source: str) -> bool:
    return source.endswith(".safetensors") or source.startswith((".", "~", "/")) or os.path.exists(source)
