"""The scan: a recurrence over segments, which backward recomputes."""

import pytest
import torch

from memstudy.attention.scan import scan


def _tokens(batch, seq, hidden_size=8):
    return torch.randn(batch, seq, hidden_size, dtype=torch.float64, requires_grad=True)


def _sums(inputs, state, params):
    """The running sum of x w, whose last value is the state."""
    (x,), (total,), (w,) = inputs, state, params
    sums = total[:, None] + (x * w).cumsum(1)
    return sums, (sums[:, -1].clone(),)


@pytest.mark.parametrize("batch", [1, 3, 19])
@pytest.mark.parametrize("segment", [1, 4, 11, 50])
def test_scan_is_the_loop_with_all_gradients(batch, segment):
    torch.manual_seed(0)
    x, first, w = _tokens(batch, 11, 2), torch.randn(batch, 2).double().requires_grad_(), _tokens(1, 1, 2)[0, 0]
    w = w.detach().requires_grad_()
    output, (last,) = scan(_sums, (x,), (first,), (w,), segment=segment)
    expected, (expected_last,) = _sums((x,), (first,), (w,))
    torch.testing.assert_close((output, last), (expected, expected_last))
    weight, of_last = torch.randn_like(expected), torch.randn_like(expected_last)
    for loss in (lambda y, z: (y * weight).sum() + (z * of_last).sum(), lambda y, z: (z * of_last).sum()):
        torch.testing.assert_close(
            torch.autograd.grad(loss(output, last), (x, first, w), retain_graph=True),
            torch.autograd.grad(loss(expected, expected_last), (x, first, w), retain_graph=True),
        )
