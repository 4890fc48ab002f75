"""The pruned aggregator forward: DINO, scores, assignment, merging, alternating attention on the tokens left."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PaceConfig
from ..errors import UnsupportedModelError
from ..hosts import vggt as backbone
from ..patching.summary import StageTimer
from ..runtime.attention import FewerKeys, autocast_dtype, faster_attention, key_numbers
from ..weights.pace import PaceWeights
from .full_heads import Heads
from .merging import kept_tokens, merge_tokens
from .propagation import following
from .restored_tokens import FollowedTokens, RestoredTokens
from .scoring import token_scores
from .selection import KEPT, assign


def aggregate(
    aggregator: nn.Module,
    images: Tensor,
    grid: tuple[int, int],
    config: PaceConfig,
    layers: tuple[int, ...],
    weights: PaceWeights | None,
    timer: StageTimer,
    checkpointing: bool = False,
) -> RestoredTokens:
    """Alternating attention over a clip, on the kept tokens only, or with frame blocks on all of them.

    Args:
        aggregator: the host's aggregator.
        images: [B, S, 3, H, W] in [0, 1], as `backbone.check_images` wants them.
        grid: patch rows and columns.
        config: how many tokens are kept and merged.
        layers: AA layers whose outputs are returned.
        weights: trained modules, on the device of the images; None for the training-free path.
        timer: keeps the stages.
        checkpointing: compute the attention blocks once more for the backward pass instead of keeping what is in them.

    Raises:
        UnsupportedModelError: the host's patch embedding does not give one token for each patch.
    """
    scorer = adapter = adaptation = None
    matching: Heads = ()
    if weights is not None:
        matching = weights.matching
        scorer, adapter, adaptation = weights.scorer, weights.merge, weights.adaptation
    batch, frames = images.shape[:2]
    patches = grid[0] * grid[1]
    keep, merge = config.kept_tokens(patches), config.merged_tokens(frames, patches)

    faster = partial(faster_attention, images.device)
    with timer.stage("DINO", frames * patches, frames * patches), faster():
        features = backbone.patch_tokens(aggregator, images)  # [B, S, P, C]
    if features.shape[2] != patches:
        raise UnsupportedModelError(
            f"the patch embedding gave {features.shape[2]} tokens for a grid of {grid[0]}x{grid[1]} patches: "
            "only hosts with one token for each patch are supported"
        )
    positions = backbone.rope_positions(aggregator, grid, images.device)  # [P, 2]

    keys = config.key_tokens(patches)
    if keep == patches:
        kept = torch.arange(patches, device=images.device).expand(batch, frames, -1)
        role = torch.full_like(kept, KEPT, dtype=torch.uint8)
        tokens = features
        if keys < keep:
            with timer.stage("scores", frames * patches, frames * patches):
                best = token_scores(features, grid, keys, scorer)
    else:
        with timer.stage("scores", frames * patches, frames * patches):
            scores = token_scores(features, grid, keep, scorer)
        with timer.stage(
            "keep" if config.dense_frames else "keep and merge", frames * patches, frames * keep
        ):
            assignment = assign(scores, keep, merge)
            if config.dense_frames:
                tokens = features
            elif merge or adapter is not None:
                tokens = merge_tokens(features, assignment, grid, adapter)
            else:
                tokens = kept_tokens(features, assignment)
            kept, role = assignment.kept, assignment.role
            best = assignment.scores.gather(2, kept)  # [B, S, K]

    special_tokens = backbone.special_tokens(aggregator, batch, frames)  # [B, S, n, C]
    special = special_tokens.shape[2]
    length = frames * (special + keep)  # of a clip in global attention
    # The stock model, to which keep ratio 1 belongs, runs with its own parameters.
    adapt = None
    if adaptation is not None and len(adaptation) > 0 and keep < patches:
        adapt = partial(adaptation, strength=adaptation.strength(config.keep_ratio))
    change = FewerKeys(key_numbers(best, special, keys), length) if keys < keep else None
    # [B, S, n + K, C]; with dense frames [B, S, n + P, C]
    entering = [torch.cat([special_tokens, tokens], dim=2)]
    del tokens
    where = None
    if positions is not None:  # special tokens sit at 0
        where = F.pad(positions[kept], (0, 0, special, 0))  # [B, S, n + K, 2]
    followed = None
    if config.dense_frames and keep < patches:
        with timer.stage("following", frames * patches, frames * patches):
            dtype = autocast_dtype(images.device.type) or features.dtype
            followed = following(features.flatten(0, 1), kept.flatten(0, 1), grid, special, dtype)
            if positions is not None and where is not None:
                followed = followed._replace(positions=where.flatten(0, 1))
                where = F.pad(positions, (0, 0, special, 0)).repeat(batch, frames, 1, 1)  # [B, S, n + P, 2]
        del features  # all that they say is in the tokens
    entered = entering[0].shape[1] * entering[0].shape[2]
    with timer.stage("alternating attention", entered, entered), faster():
        # Popped, so that nobody holds them while the blocks run.
        compact = backbone.alternating_attention(
            aggregator, entering.pop(), where, layers, checkpointing, change, adapt, followed, matching
        )
    if change is not None:
        change.check()
    depth = backbone.depth(aggregator)
    if followed is not None:
        return FollowedTokens(compact, depth, kept, role, grid, special, followed)
    restoration = None if weights is None else weights.restoration
    return RestoredTokens(compact, depth, features, kept, role, grid, special, restoration)
