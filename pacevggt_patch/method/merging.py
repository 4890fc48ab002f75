"""Merge tokens into the kept token that is most like them, by a mean and by what is learned on top of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .selection import PRUNED, Assignment
from .similarity import grid_cells, similarity_to_kept

# Frames at a time: bounds the [frames, K, P] similarities.
FRAMES_PER_CHUNK = 32
# Weights of tokens within a group differ by factors up to the exponential of twice this.
LARGEST_PULL = 8.0


class MergeAdapter(nn.Module):
    """Learned part of the merge: what a mean of tokens loses of them.

    Attention sees fewer tokens, and nothing after it can mend what they do not carry in. So each kept token gets a
    residual, made from itself and from the group of tokens that are merged into it (itself among them): every member
    passes a small network that knows its feature and where it lies as seen from the kept token; the results are
    averaged with the weights of the merge times a learned pull, one for each head; a second small network sees that,
    the kept token, and how many members there are, where and how far spread.

    The last layer is zero-initialised, so that the untrained module changes nothing.

    Args:
        embed_dim: channels C of a patch token.
        hidden_dim: width of both networks, a multiple of `heads`.
        heads: groups of channels that are averaged with weights of their own.
    """

    def __init__(self, embed_dim: int, hidden_dim: int | None = None, heads: int = 4):
        super().__init__()
        hidden_dim = hidden_dim or heads * max(1, embed_dim // (2 * heads))
        self.heads = heads
        self.norm = nn.LayerNorm(embed_dim)
        self.token = nn.Linear(embed_dim, hidden_dim)
        self.place = nn.Linear(2, hidden_dim, bias=False)
        self.pull = nn.Linear(hidden_dim, heads)
        self.mix = nn.Linear(2 * hidden_dim + 4, hidden_dim)
        self.out = nn.Linear(hidden_dim, embed_dim)
        for layer in (self.pull, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, kept: Tensor, share: Tensor, offset: Tensor) -> Tensor:
        """Residual [N, K, C] (float32) of the kept tokens.

        Args:
            tokens: [N, P, C], one row a frame.
            kept: [N, K] indices into P.
            share: [N, K, P] weight of each token in the group of each kept token; rows sum to 1.
            offset: [N, P, 2] position of a token minus that of its kept token, in units of the grid's longer side.
        """
        hidden = F.gelu(self.token(self.norm(tokens.float())) + self.place(offset))  # [N, P, H]
        own = hidden.gather(1, kept.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # [N, K, H]
        pull = self.pull(hidden).clamp(-LARGEST_PULL, LARGEST_PULL).exp()  # [N, P, heads]
        pulled = (hidden.unflatten(-1, (self.heads, -1)) * pull.unsqueeze(-1)).flatten(-2)
        # The same for every token of a group drops out: no matrix [K, P] for each head is needed.
        mean = (share @ pulled).unflatten(-1, (self.heads, -1)) / (share @ pull).unsqueeze(-1)
        member = (share > 0).float()
        count = member.sum(-1, keepdim=True)  # [N, K, 1]
        centre = member @ offset / count  # [N, K, 2]
        spread = (member @ offset.square().sum(-1, keepdim=True) / count).sqrt()  # [N, K, 1]
        inputs = torch.cat([own, mean.flatten(-2), count.log(), centre, spread], dim=-1)
        return self.out(F.gelu(self.mix(inputs)))


def kept_tokens(tokens: Tensor, assignment: Assignment) -> Tensor:
    """The kept tokens [B, S, K, C] of `tokens` [B, S, P, C], in raster order, as they are."""
    return tokens.gather(2, assignment.kept.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))


def merge_tokens(
    tokens: Tensor,
    assignment: Assignment,
    grid: tuple[int, int] | None = None,
    adapter: MergeAdapter | None = None,
) -> Tensor:
    """The kept tokens, each a mean of itself and the tokens merged into it, weighted by their scores.

    A merged token goes to the kept token of its own frame with the largest cosine similarity. Kept tokens into which
    nothing is merged stay as they are, to the bit. Gradients flow to the scores: a mean moves towards the token whose
    score rises.

    Args:
        tokens: DINO patch tokens [B, S, P, C].
        assignment: of these tokens.
        grid: patch rows and columns; only an adapter asks for it.
        adapter: adds what it learned to every kept token; None leaves the mean (training-free).

    Returns:
        [B, S, K, C] in the dtype of `tokens`.
    """
    parts = zip(
        *(
            t.flatten(0, 1).split(FRAMES_PER_CHUNK)
            for t in (tokens, assignment.kept, assignment.role, assignment.scores)
        ),
        strict=True,
    )
    merged = [_merge_frames(*part, grid, adapter) for part in parts]
    return torch.cat(merged).unflatten(0, tokens.shape[:2])


def _merge_frames(
    tokens: Tensor,
    kept: Tensor,
    role: Tensor,
    scores: Tensor,
    grid: tuple[int, int] | None,
    adapter: MergeAdapter | None,
) -> Tensor:
    """`merge_tokens` for tokens [N, P, C], kept [N, K], role and scores [N, P]."""
    channels = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    with torch.autocast(tokens.device.type, enabled=False):
        target = merge_targets(tokens, kept)  # [N, P]
        weight = scores.float().clamp(min=torch.finfo(torch.float32).tiny).masked_fill(role == PRUNED, 0)
        share = weight.new_zeros(*kept.shape, tokens.shape[1])  # [N, K, P]
        share.scatter_(1, target.unsqueeze(1), weight.unsqueeze(1))
        merged = (share > 0).sum(-1, keepdim=True) > 1  # [N, K, 1]
        share = share / share.sum(-1, keepdim=True)
        mean = (share @ tokens.float()).to(tokens.dtype)
        mean = torch.where(merged, mean, tokens.gather(1, channels))
        if adapter is None or grid is None:
            return mean
        cells = grid_cells(grid, tokens.device)  # [P, 2]
        offset = (cells - cells[kept.gather(1, target)]) / max(grid)  # [N, P, 2]
        return (mean.float() + adapter(tokens, kept, share, offset)).to(tokens.dtype)


def merge_targets(features: Tensor, kept: Tensor) -> Tensor:
    """For each token the place in `kept` of the kept token most like it; for a kept token its own place.

    Args:
        features: [N, P, C].
        kept: [N, K] indices into P.

    Returns:
        [N, P] (int64), in [0, K).
    """
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return similarity_to_kept(features, kept).argmax(-1).scatter(1, kept, own)
