"""Whole columns: the pattern, OBS against a naive float64 reference, FLAP against its formula, gradients."""

import itertools

import families
import jobs
import pytest
import torch
from problems import layer, statistics_of
from solving import case, run
from torch.nn.functional import cross_entropy

from oneshot import calibrate, models
from oneshot.calibrate.statistics import NEEDS, Statistics
from oneshot.prune import loop
from oneshot.prune.options import Options
from oneshot.prune.patterns import Columns
from oneshot.prune.solvers import obs


def best_error(W, G, kept):
    """The layer's error with the least-squares values of the kept columns, and these values; float64, naive."""
    W_hat = torch.zeros_like(W)
    W_hat[:, kept] = torch.linalg.solve(G[kept][:, kept], (W @ G[:, kept]).T).T
    D = W - W_hat
    return torch.trace(D @ G @ D.T), W_hat


def naive_obs(W, G, pattern):
    """Which units are kept: one at a time goes, the one after which the best error of the layer is least."""
    size, units = pattern.size, W.shape[1] // pattern.size
    kept = list(range(units))

    def columns(left):
        return torch.tensor([u * size + i for u in left for i in range(size)])

    for segment in range(0, units, pattern.count):
        assert segment == 0, "the reference knows one segment"
    while len(kept) > pattern.kept:
        errors = [best_error(W, G, columns([v for v in kept if v != u]))[0] for u in kept]
        kept.pop(int(torch.stack(errors).argmin()))
    return columns(kept)


@pytest.mark.parametrize("pattern", [Columns(5, 12), Columns(2, 4, 3), Columns(1, 3, 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_obs_removes_what_the_naive_search_does(pattern, seed):
    W, X = layer(4, 12, 60, seed=seed)
    G = X.T @ X / len(X)
    damped = G + 0.01 * G.diagonal().mean() * torch.eye(12, dtype=G.dtype)
    kept = naive_obs(W, damped, pattern)
    solution = run(case("obs", step=1e-9), W, X, pattern)
    assert solution.mask[0].nonzero()[:, 0].tolist() == kept.tolist()
    ridge = G[kept][:, kept] + 0.01 * G.diagonal().mean() * torch.eye(len(kept), dtype=G.dtype)
    gone = ~solution.mask[0]
    wanted = W[:, kept] + torch.linalg.solve(ridge, (W[:, gone] @ G[gone][:, kept]).T).T
    torch.testing.assert_close(solution.W_hat[:, kept], wanted, rtol=1e-8, atol=1e-10)


def test_the_increase_is_exact():
    """Δ of a unit is what the best error of the layer grows by when it goes."""
    W, X = layer(3, 12, 40)
    G = X.T @ X / len(X)
    P, columns = torch.linalg.inv(G), torch.arange(12).view(4, 3)
    for u, found in enumerate(obs.increases(W, P, columns)):
        left = torch.cat([columns[v] for v in range(4) if v != u])
        torch.testing.assert_close(found, best_error(W, G, left)[0], rtol=1e-7, atol=1e-9)


def test_units_of_each_segment_are_counted_alone():
    """Query heads: of every `count` units as many go, wherever the smallest are."""
    score = torch.arange(24.0).expand(2, -1)
    keep = Columns(2, 3, 4).keep(score)
    assert keep[0].view(2, 3, 4).all(2).tolist() == [[False, True, True]] * 2
    assert torch.equal(keep[0], keep[1]) and Columns(2, 3, 4).zeros(2, 24) == int((~keep).sum()) == 16


def test_holds_and_bytes():
    W = torch.ones(3, 12)
    assert not Columns(1, 2, 3).holds(W) and Columns(1, 2, 3).holds(W * Columns(1, 2, 3).keep(W))
    assert not Columns(1, 2, 5).holds(W) and Columns(3, 4).bytes(3, 12, 2) == 3 * 9 * 2
    with pytest.raises(ValueError, match="divisible by 10"):
        Columns(1, 2, 5).check(3, 12)


def test_ridge_is_chosen_on_held_out_tokens():
    """Tokens of pure noise on which a fit means nothing: the held-out ones say so, and nothing is changed."""
    gen = torch.Generator().manual_seed(0)
    W, X = torch.randn(3, 16, generator=gen), torch.randn(20, 16, generator=gen)
    statistics = Statistics(16, {"outer", "held"})
    statistics.update(X)
    statistics.update(torch.randn(4000, 16, generator=gen), held=True)
    train, held = statistics.apart
    torch.testing.assert_close(train, X.T @ X / len(X), rtol=1e-2, atol=1e-2)
    solution = run(case("obs"), W, X, Columns(8, 16), statistics)
    ridges = (0.0, *obs.RIDGES)
    kept = solution.mask[0]
    errors = [obs.error(W, kept, obs.ridge_change(W, kept, train, r) if r else 0 * W[:, kept], held) for r in ridges]
    assert solution.info["ridge"] == ridges[errors.index(min(errors))] and solution.info["ridge"] != 0.01


def test_flap_is_its_formula():
    W, X = layer(5, 12, 50)
    solution = run(case("flap"), W, X, Columns(2, 4, 3))
    score = (X.var(0, unbiased=False) * W.square().sum(0)).square().view(4, 3).sum(1)
    kept = torch.zeros(4, dtype=torch.bool)
    kept[score.topk(2).indices] = True
    assert torch.equal(solution.mask[0], kept.repeat_interleave(3))
    torch.testing.assert_close(solution.bias, W[:, ~solution.mask[0]] @ X.mean(0)[~solution.mask[0]])
    assert run(case("flap", bias=False), W, X, Columns(2, 4, 3)).bias is None


@pytest.mark.parametrize("method, score", [("magnitude", lambda W, X: W.square()),
                                           ("wanda", lambda W, X: W.abs() * X.square().mean(0).sqrt())])
def test_scores_are_summed_over_columns(method, score):
    W, X = layer(5, 12, 50)
    total = score(W, X).sum(0)
    kept = run(case(method), W, X, Columns(5, 12)).mask[0]
    assert sorted(total.topk(5).indices.tolist()) == kept.nonzero()[:, 0].tolist()


def test_alps_finds_the_best_columns_of_small_layers():
    """Against all choices: within a tenth of the best."""
    W, X = layer(3, 8, 60)
    G = X.T @ X / len(X)
    best = min(best_error(W, G, torch.tensor(kept))[0] for kept in itertools.combinations(range(8), 4))
    for method in ("alps", "obs"):
        solution = run(case(method), W, X, Columns(4, 8))
        D = W - solution.W_hat
        assert torch.trace(D @ G @ D.T) <= 1.1 * best


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon", "gpt_oss"])
def test_gradients_are_autograds(name):
    model = families.tiny(name)
    ids, mask = jobs.tokens(5), torch.ones(5, families.T, dtype=torch.bool)
    mask[1, 15:] = False
    weights = {w.name: w for w in models.all_weights(model)}
    activations = loop.start(model, ids, mask, Options(batch_size=2, device="cpu", progress=False))
    found = calibrate.gradients(model, activations, weights)
    sums, squares = {}, {}
    with models.experts_one_by_one(model):
        for batch in (slice(0, 2), slice(2, 4), slice(4, 5)):
            for p in model.parameters():
                p.requires_grad_(True)
                p.grad = None
            logits = model(input_ids=ids[batch], attention_mask=mask[batch].long(), use_cache=False).logits[:, :-1]
            target = ids[batch][:, 1:].masked_fill(~(mask[batch][:, 1:] & mask[batch][:, :-1]), -100)
            cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
            for key, w in weights.items():
                g = torch.zeros_like(w.parameter) if w.parameter.grad is None else w.parameter.grad
                g = g if w.expert is None else g[w.expert]
                g = g.T if w.transposed else g
                sums[key] = sums.get(key, 0) + g / 3
                squares[key] = squares.get(key, 0) + g.square() / 3
    assert found.keys() == weights.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient.mean, sums[key], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(gradient.mean_sq, squares[key], rtol=1e-3, atol=1e-8)


def test_needs_are_known():
    assert {"held", "gradient"} <= NEEDS and statistics_of(torch.randn(4, 3), {"held"}).apart is None


def test_an_inverse_that_rounding_has_spoilt_is_computed_again():
    """As many columns as tokens, nearly alike, in float32: the result is that of float64."""
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(40, 4, generator=gen) @ torch.randn(4, 32, generator=gen)
    X += 1e-4 * torch.randn(40, 32, generator=gen)
    W = torch.randn(3, 32, generator=gen)
    G = X.T @ X / len(X)
    G.diagonal().add_(1e-7 * G.diagonal().mean())
    for dtype in (torch.float32, torch.float64):
        kept = obs.remove(W.to(dtype), torch.linalg.inv(G.double()).to(dtype), Columns(6, 32), 2)
        assert int(kept.sum()) == 6
    P = obs.inverse_on(G.double(), kept)
    torch.testing.assert_close(P[kept][:, kept], torch.linalg.inv(G.double()[kept][:, kept]))
    assert torch.equal(P[~kept][:, ~kept], torch.eye(26, dtype=torch.float64))
