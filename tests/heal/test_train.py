"""Training with a fixed mask: the rate, the early stop, the least-squares solution, the seed."""

import math

import families
import pytest
import torch
from healing import heal_pruned

from oneshot import models
from oneshot.heal import block as by_block
from oneshot.heal.train import BETAS, Fitting, Trainable, fit
from oneshot.runtime import environment


class Scalar:
    """One weight w, starting at 1, trained by `fit` on batch 0 towards `towards`, judged on batch 1 by `best`.

    path: w at each step.
    """

    def __init__(self, *, towards, best, **settings):
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight.data.fill_(1)
        self.path, w, loss = [], layer.weight, (towards, best)

        def value(i):
            if torch.is_grad_enabled():
                assert i == 0  # never trained on what is held out
                self.path.append(w.item())
            return loss[i](w).sum()
        with Trainable(layer, {"weight": torch.float32}) as trainable:
            self.info = fit(trainable, value, [False, True], seed=0, **settings)
        self.w = float(w)


def square_to(x):
    return lambda w: (w - x).square()


def test_the_rate_warms_up_and_falls_as_a_cosine():
    """Under a constant gradient Adam's step is the rate itself."""
    steps, lr = 40, 0.05
    found = Scalar(towards=lambda w: -w, best=lambda w: -w, steps=steps, lr=lr)
    moved = torch.tensor([*found.path, found.w]).diff()
    want = [lr * min((t + 1) / 2, 1) * (0.5 + 0.5 * math.cos(math.pi * t / steps)) for t in range(steps)]
    torch.testing.assert_close(moved, torch.tensor(want), rtol=1e-3, atol=1e-5)


def test_training_ends_when_the_held_out_loss_got_worse_twice_in_a_row():
    """Training leads from 1 to 1.9, the held-out loss is best at 1.5; looks after 50, 100, 150, 200, 300, 400 steps."""
    found = Scalar(towards=square_to(1.9), best=square_to(1.5), steps=400, lr=0.02)
    assert found.info["steps"] == len(found.path) == 150 and not found.info["warnings"]
    assert found.w == pytest.approx(found.path[50]) and found.path[100] > found.w + 0.15  # 1.7, then 1.9
    assert found.info["held_out_before"] == pytest.approx(0.25)
    assert found.info["held_out_after"] == pytest.approx((found.w - 1.5) ** 2, rel=1e-4)


def test_a_rate_that_does_harm_is_halved_and_the_harm_undone():
    found = Scalar(towards=square_to(3), best=square_to(1.2), steps=160, lr=0.4)
    assert [found.path[k] for k in (0, 20, 40, 60)] == [1, 1, 1, 1] and max(found.path[:20]) > 1.5  # after three looks
    assert found.info["lr"] == 0.4 / 2**4 and found.info["steps"] == 160 and 1.1 < found.w < 1.35
    assert found.info["held_out_after"] < found.info["held_out_before"]
    assert found.info["warnings"] == ["learning rate lowered from 0.4 to 0.025"]


def test_what_was_gained_before_the_harm_is_kept():
    """It begins with the second look: the state of the first is restored, not the one of the start."""
    found = Scalar(towards=square_to(9), best=square_to(1.3), steps=160, lr=0.02)
    assert found.info["lr"] < 0.02 and found.path.count(1) == 1
    assert found.path[40] == pytest.approx(found.path[20]) and found.w == pytest.approx(1.3, abs=0.05)


def test_where_nothing_is_gained_the_weights_are_left_as_they_were():
    found = Scalar(towards=square_to(3), best=square_to(0.5), steps=160, lr=0.4)
    assert found.path.count(1) == 6 and found.w == 1 and max(found.path) > 1.1
    assert found.info["held_out_after"] == found.info["held_out_before"] == pytest.approx(0.25)
    assert found.info["warnings"] == ["nothing gained at learning rates from 0.4 down to 0.0125: left as it was"]


def test_a_model_whose_held_out_windows_ask_for_the_opposite_is_left_as_it_was(monkeypatch):
    real = by_block.distance

    def opposed(block, activations, targets):
        loss = real(block, activations, targets)
        return lambda i: -loss(i) if activations.held[i] else loss(i)
    monkeypatch.setattr(by_block, "distance", opposed)
    plain, healed = families.tiny("llama"), families.tiny("llama")
    heal_pruned(plain, "none")
    result = heal_pruned(healed, "block", **{"block.steps": 16})
    for info in (b["heal"]["block"] for b in result.blocks):
        assert info["held_out_after"] == info["held_out_before"] < 0 < info["steps"]
    assert sum("left as it was" in w for w in result.warnings) == 2
    for p, q in zip(plain.parameters(), healed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_fit_finds_the_least_squares_solution():
    """On a linear layer with a mask the optimum is known."""
    gen = torch.Generator().manual_seed(0)
    X, W = torch.randn(8, 64, 6, generator=gen), torch.randn(3, 6, generator=gen)
    layer = torch.nn.Linear(6, 3, bias=False)
    keep = torch.rand(3, 6, generator=gen) > 0.4
    layer.weight.data = W * keep
    with Trainable(layer, {"weight": torch.float32}) as trainable:
        fit(trainable, lambda i: (layer(X[i]) - X[i] @ W.T).square().mean(), 7 * [False] + [True], steps=800,
            lr=0.05, seed=0)
    flat = X.reshape(-1, 6).double()
    for r in range(3):
        want = torch.linalg.lstsq(flat[:, keep[r]], flat @ W[r].double()).solution
        torch.testing.assert_close(layer.weight[r, keep[r]].double(), want, rtol=0.1, atol=0.05)
    assert not layer.weight[~keep].any()


def test_gradients_are_used_as_they_come_and_nothing_else_differs():
    """The updates of one Adam over all parameters after the backward pass, bit for bit, one gradient at a time."""
    keep = torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    X = torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(1))

    def layers():
        made = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in keep))
        for n, (layer, mask) in enumerate(zip(made, keep, strict=True)):
            layer.weight.data = mask * torch.eye(16).roll(n, 0).add(0.1)
            layer.bias.data.fill_(0.1)
        return made

    def loss(i):
        return (trained(X[i]) - X[i].flip(-1)).square().mean()
    trained, together = layers(), []
    stored = {name: torch.float32 for name, _ in trained.named_parameters()}
    with Trainable(trained, stored) as trainable:
        for p in trained.parameters():  # before training's own hooks
            p.register_post_accumulate_grad_hook(
                lambda p: together.append(sum(q.grad is not None for q in trained.parameters())))
        fit(trainable, loss, 8 * [False], steps=12, lr=0.05, seed=0)
    assert len(together) == 12 * 12 and max(together) == 1
    fused, trained = trained, layers()
    with Trainable(trained, stored) as trainable:
        fitting = Fitting(trainable, loss, 8 * [False], 12, 0, None)
        plain = torch.optim.Adam(trainable.groups(0.05), betas=BETAS, fused=True)
        rates = [group["lr"] for group in plain.param_groups]
        order = torch.Generator().manual_seed(0)
        batches = [i for _ in range(2) for i in reversed(torch.randperm(8, generator=order).tolist())]
        for step, batch in enumerate(batches[:12]):
            for group, rate in zip(plain.param_groups, rates, strict=True):
                group["lr"] = rate * fitting.rate_at(step)
            plain.zero_grad()
            loss(batch).backward()
            trainable.mask_gradients()
            plain.step()
    for p, q in zip(fused.parameters(), trained.parameters(), strict=True):
        assert torch.equal(p, q)


def test_seed_decides_and_nothing_else():
    def weights(seed):
        layer = torch.nn.Linear(4, 4)
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        X = torch.randn(10, 5, 4, generator=torch.Generator().manual_seed(1))
        with Trainable(layer, dict.fromkeys(("weight", "bias"), torch.float32)) as trainable:
            fit(trainable, lambda i: (layer(X[i]) - X[i].flip(-1)).square().mean(), [True] + 9 * [False], steps=5,
                lr=0.1, seed=seed)
        return layer.weight.detach().clone()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_no_negative_zero_is_stored():
    model = families.tiny("llama", dtype=torch.float16)
    for p in model.parameters():
        p.data.mul_(1e-4)
    heal_pruned(model, "block", **{"block.steps": 3})
    for block in models.blocks(model)[1]:
        for p in block.parameters():
            assert not (torch.signbit(p) & (p == 0)).any()


@pytest.mark.parametrize("fast, dtype, products", [
    (True, torch.bfloat16, "bfloat16"), (True, torch.float16, "bfloat16"), (True, torch.float32, "float32"),
    (False, torch.bfloat16, "float32")])
def test_products_are_bfloat16_where_that_is_fast_and_the_model_is_stored_in_16_bits(monkeypatch, fast, dtype,
                                                                                    products):
    monkeypatch.setattr(environment, "fast_bfloat16", lambda device: fast)
    layer, seen = torch.nn.Linear(8, 8, bias=False), set()

    def value(i):
        out = layer(torch.ones(2, 8))
        seen.add(str(out.dtype).removeprefix("torch."))
        assert layer.weight.dtype == torch.float32
        return out.float().square().mean()
    with Trainable(layer, {"weight": dtype}) as trainable:
        info = fit(trainable, value, [False, True], steps=8, lr=0.02, seed=0)
    assert seen == {info["products"]} == {products} and info["held_out_after"] < info["held_out_before"]


@pytest.mark.parametrize("method", ["block", "distil"])
@pytest.mark.parametrize("name", sorted(set(families.FAMILIES) - set(families.REFUSED)))
def test_every_family_heals_with_bfloat16_products(monkeypatch, name, method):
    monkeypatch.setattr(environment, "fast_bfloat16", lambda device: True)
    result = heal_pruned(families.tiny(name, dtype=torch.bfloat16), method, **{f"{method}.steps": 4})
    said = [row["heal"][method] for row in result.blocks if "heal" in row] + list(result.heal.values())
    assert said and all(info["products"] == "bfloat16" for info in said)
