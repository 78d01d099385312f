"""A loss for a few tokens at a time: the value and the gradient of the whole, in float64 and in training's dtypes."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from oneshot.heal import sliced


def problem(dtype, shape=(3, 70, 11)):
    g = torch.Generator().manual_seed(0)
    logits, dense = (torch.randn(shape, generator=g, dtype=torch.float64).mul_(3).to(dtype) for _ in range(2))
    return logits.requires_grad_(True), dense, torch.randperm(shape[0] * shape[1], generator=g)[:150].sort().values


def plain_kl(logits, dense, rows, temperature=1.0):
    log_q, log_p = ((z.flatten(0, 1)[rows] / temperature).log_softmax(-1) for z in (logits, dense))
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_value_and_gradient_are_those_of_the_whole(dtype, limit, temperature):
    """More tokens than one slice has, some of them left out, behind a factor as accumulation has one."""
    logits, dense, rows = problem(dtype)
    flat = dense.flatten(0, 1)
    got = sliced.mean(lambda z, part: sliced.divergence(z, flat[part].to(z), temperature), logits, rows)
    exact = logits.detach().double().requires_grad_(True)
    want = plain_kl(exact, dense.double(), rows, temperature)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(got.item() - want.item()) <= limit * want.item()
    (got / 3).backward()
    (want / 3).backward()
    assert logits.grad.dtype == dtype and (logits.grad - exact.grad).norm() <= limit * exact.grad.norm()
    left_out = torch.ones(len(flat), dtype=torch.bool)
    left_out[rows] = False
    assert not logits.grad.flatten(0, 1)[left_out].any()


def test_any_loss_of_a_token():
    logits, _, rows = problem(torch.float32)
    labels = torch.arange(210) % 11
    got = sliced.mean(lambda z, part: cross_entropy(z, labels[part], reduction="none"), logits, rows)
    torch.testing.assert_close(got, cross_entropy(logits.flatten(0, 1)[rows], labels[rows]))


def test_without_gradients_none_is_computed():
    logits, dense, rows = problem(torch.float32)
    flat, seen = dense.flatten(0, 1), []

    def loss(z, part):
        seen.append(z.requires_grad)
        return sliced.divergence(z, flat[part])
    with torch.no_grad():
        torch.testing.assert_close(sliced.mean(loss, logits, rows), plain_kl(logits, dense, rows))
    assert seen == [False] * 3


def test_no_tokens_are_no_number():
    logits, _, _ = problem(torch.float32)
    assert sliced.mean(lambda z, part: z.sum(-1), logits, torch.zeros(0, dtype=torch.long)).isnan()
