"""The training step, number by number: Adam with a fixed mask against the same written by hand in float64.

All constants stand here as numbers: change one in oneshot/heal/train.py and this turns red.
"""

import math

import healing
import jobs
import pytest
import torch
from families import tiny
from torch import nn

from oneshot import calibrate, models
from oneshot.heal import distil, train
from oneshot.heal.train import Trainable, fit

F64 = {"dtype": torch.float64}


class Small(nn.Module):
    """y = W₂ (norm · (W₁ x)) + bias: two matrices with zeros, a norm, a bias that begins at zero; float64."""

    def __init__(self, seed=0):
        super().__init__()
        gen = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return nn.Parameter(torch.randn(*shape, generator=gen, **F64))
        self.first, self.second = randn(6, 5), randn(3, 6)
        self.norm, self.bias = randn(6), nn.Parameter(torch.zeros(3, **F64))
        for W in (self.first, self.second):
            W.data *= torch.rand(W.shape, generator=gen, **F64) > 0.4
        self.first.data *= 7  # matrices of different size have different rates

    def forward(self, x):
        return (x @ self.first.T * self.norm) @ self.second.T + self.bias


def batches(n=5):
    gen = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 5, generator=gen, **F64), torch.randn(8, 3, generator=gen, **F64)) for _ in range(n)]


def by_hand(model, data, steps, lr, seed):
    """Adam (arXiv 1412.6980, algorithm 1), a parameter at a time, on gradients that are zero where the weight is.

    Each tensor's rate: lr times the root mean square of what may change, a tenth of that for norms and biases; a bias
    of zeros takes the matrices' mean. It rises in a line over a twentieth of the steps and falls as half a cosine.
    """
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {name: (p != 0).double() if p.ndim > 1 else torch.ones_like(p) for name, p in parameters.items()}
    size = {name: math.sqrt(float((p**2).sum() / masks[name].sum())) for name, p in parameters.items()}
    usual = (size["first"] + size["second"]) / 2
    rates = {"first": lr * size["first"], "second": lr * size["second"], "norm": 0.1 * lr * size["norm"],
             "bias": 0.1 * lr * usual}
    m = {name: torch.zeros_like(p) for name, p in parameters.items()}
    v = {name: torch.zeros_like(p) for name, p in parameters.items()}
    gen, queue = torch.Generator().manual_seed(seed), []
    for t in range(steps):
        queue = queue or torch.randperm(len(data), generator=gen).tolist()
        x, y = data[queue.pop()]
        gradients = gradients_of(parameters, x, y)
        share = min((t + 1) / max(1, round(0.05 * steps)), 1.0) * (1 + math.cos(math.pi * t / steps)) / 2
        for name, g in gradients.items():
            g = g * masks[name]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (t + 1)), v[name] / (1 - 0.95 ** (t + 1))
            parameters[name] = parameters[name] - share * rates[name] * m_hat / (v_hat.sqrt() + 1e-8)
    return parameters


def gradients_of(parameters, x, y):
    """Of the mean squared error of Small, by the chain rule."""
    first, second, norm, bias = (parameters[name] for name in ("first", "second", "norm", "bias"))
    hidden = x @ first.T
    d = 2 * ((hidden * norm) @ second.T + bias - y) / y.numel()
    back = d @ second
    return {"first": (back * norm).T @ x, "second": d.T @ (hidden * norm), "norm": (back * hidden).sum(0),
            "bias": d.sum(0)}


def trained(steps=43, lr=0.05, seed=3):
    """(what `fit` makes of Small, what is made by hand), {name: tensor} each."""
    model, data = Small(), batches()
    want = by_hand(model, data, steps, lr, seed)
    with Trainable(model, dict.fromkeys(want, torch.float64)) as trainable:
        fit(trainable, lambda i: (model(data[i][0]) - data[i][1]).square().mean(), [False] * len(data), steps=steps,
            lr=lr, seed=seed)
    return {name: p.detach() for name, p in model.named_parameters()}, want


@pytest.mark.parametrize("steps", [1, 7, 43])
def test_every_parameter_moves_as_by_hand(steps):
    got, want = trained(steps)
    for name, p in want.items():
        torch.testing.assert_close(got[name], p, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(p, dict(Small().named_parameters())[name])


def test_the_gradients_by_hand_are_those_of_autograd():
    model, (x, y) = Small(), batches(1)[0]
    (model(x) - y).square().mean().backward()
    by_rule = gradients_of({name: p.detach() for name, p in model.named_parameters()}, x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(by_rule[name], p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("constant, other", [("BETAS", (0.9, 0.999)), ("BETAS", (0.8, 0.95)), ("VECTORS", 1.0),
                                             ("WARM_UP", 0.1)])
def test_another_constant_would_be_seen(monkeypatch, constant, other):
    monkeypatch.setattr(train, constant, other)
    got, want = trained()
    assert not all(torch.allclose(got[name], want[name], rtol=1e-4) for name in want)


@pytest.mark.parametrize("padded", [False, True])
def test_distil_is_judged_by_the_divergence_of_whole_models(padded):
    """Before its first step: the mean KL over the held-out windows' tokens, by plain forwards."""
    model, dense, ids = tiny("llama"), tiny("llama"), jobs.tokens(8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, 15:] = not padded
    held = train.held_out_windows(8, 16, 0)
    behind = calibrate.capture(dense, ids, mask, batch_size=4, held_out=held)
    for block in models.walk(dense):
        calibrate.replay(block.module, behind, block.number)
    jobs.prune(model, "wanda", ids=ids, mask=mask)
    want = healing.kl(dense, model, ids[list(held)], mask[list(held)])
    info = distil.Heal(distil.Config(steps=1)).after_model(model, behind)
    assert info["held_out_before"] == pytest.approx(want, rel=1e-5) and want > 0.01
