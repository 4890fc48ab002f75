"""A few rows at a time give what all give, and no function sees more of them."""

import pytest
import torch

from pacevggt_patch.chunks import in_chunks


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_same_as_at_once(size, dim):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 7, 3, generator=generator)
    seen = []

    def function(a, nothing, b):
        assert nothing is None
        seen.append(a.shape[dim])
        return a.sin() * b, (a - b).sum(-1).half()

    found = in_chunks(function, size, x, None, y, dim=dim)
    assert sum(seen) == 7 and max(seen) == min(size, 7) and len(seen) == -(-7 // size)
    for one, other in zip(found, (x.sin() * y, (x - y).sum(-1).half()), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_gradients():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for size in (2, 7):
        (out,) = in_chunks(lambda part: (part.square(),), size, x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(gradient, 2 * x.detach())


def test_a_compiler_gets_all_at_once():
    seen = []

    def function(part):
        seen.append(len(part))
        return (part + 1,)

    @torch.compile(backend="eager")
    def compiled(x):
        return in_chunks(function, 2, x)[0]

    assert torch.equal(compiled(torch.zeros(7)), torch.ones(7)) and seen == [7]
