"""A few rows at a time give what all give, and no function sees more of them."""

import pytest
import torch

from pacevggt_patch.runtime.chunks import HIDDEN_BYTES, chunk_rows, in_chunks


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("dim", [0, 1])
@torch.no_grad()
def test_the_same_as_at_once(size, dim):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 7, 3, generator=generator)
    seen = []

    def function(a, nothing, b):
        assert nothing is None
        seen.append(a.shape[dim])
        return a.sin() * b, (a - b).sum(-1).half()

    found = in_chunks(function, size, x, None, y, dim=dim)
    assert sum(seen) == 7 and max(seen) <= size and len(seen) == -(-7 // size)
    for one, other in zip(found, (x.sin() * y, (x - y).sum(-1).half()), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@torch.no_grad()
def test_no_chunk_is_of_a_single_row():
    """A compiler would make a function for it alone."""
    for rows in range(2, 100):
        for size in range(3, 100):
            seen = []
            in_chunks(lambda x, seen=seen: (seen.append(len(x)), x)[1:], size, torch.zeros(rows))
            assert sum(seen) == rows and max(seen) <= size
            assert min(seen) > 1 and max(seen) - min(seen) <= 1


def test_gradients_get_all_at_once():
    """Chunks would save nothing, and their gradients take long."""
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seen = []
    (out,) = in_chunks(lambda part: (seen.append(len(part)), part.square())[1:], 2, x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, 2 * x.detach()) and seen == [7]


def test_a_compiler_gets_all_at_once():
    seen = []

    def function(part):
        seen.append(len(part))
        return (part + 1,)

    @torch.compile(backend="eager")
    def compiled(x):
        return in_chunks(function, 2, x)[0]

    assert torch.equal(compiled(torch.zeros(7)), torch.ones(7)) and seen == [7]


def test_the_hidden_layer_of_a_chunk_stays_below_its_limit():
    device = torch.device("cpu")
    for channels in (1, 32, 1024 * 1036):
        rows = chunk_rows(channels, device)
        assert rows == 1 or rows * 4 * channels * 4 <= HIDDEN_BYTES["cpu"] < (rows + 1) * 4 * channels * 4
    assert chunk_rows(10**9, device) == 1
    assert chunk_rows(1024, torch.device("meta")) > chunk_rows(1024, device)
