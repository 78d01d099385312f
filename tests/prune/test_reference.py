"""The references themselves against first principles: direct solves, brute force, hand-made cases."""

from fractions import Fraction
from itertools import combinations

import pytest
import reference as ref
import torch

F64 = {"rtol": 1e-9, "atol": 1e-11}
SHAPES = [(5, 12, 60, 4), (3, 16, 7, 8), (4, 13, 40, 5), (1, 8, 30, 128)]
# R, C, T, block: several blocks; fewer tokens than columns; a ragged last block; one block


def problem(R, C, T, seed=0, dead=()):
    """Weights and strongly correlated inputs; the inputs in `dead` are always zero."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(R, C, generator=gen, dtype=torch.float64)
    mix = torch.eye(C, dtype=torch.float64) + 0.5 * torch.randn(C, C, generator=gen, dtype=torch.float64)
    X = torch.randn(T, C, generator=gen, dtype=torch.float64) @ mix
    X[:, list(dead)] = 0
    return W, X


def best_rest(w, fixed, G):
    """Row (C,) whose first entries are `fixed` and whose others are the least-squares optimum given them.

    min over v with v[:f] = fixed of (w - v) G (w - v)^T: a direct solve, no Cholesky factor, no recursion.
    """
    f = len(fixed)
    v = torch.cat([fixed, w[f:]])
    if f < len(w):
        v[f:] += torch.linalg.solve(G[f:, f:], G[f:, :f] @ (w[:f] - fixed))
    return v


def removal_costs(current, G):
    """(C,) error that removing j adds, once all before j are frozen and all after j move to their best."""
    C, costs = len(current), []
    for j in range(C):
        D = G[j:, j:]
        d = torch.zeros(C - j, dtype=G.dtype)
        d[0] = -current[j]
        if j + 1 < C:
            d[1:] = -torch.linalg.solve(D[1:, 1:], D[1:, 0] * d[0])
        costs.append(d @ D @ d)
    return torch.stack(costs)


def sequential_obs(W, G, pattern, block):
    """The idea behind SparseGPT, by solves only: fix columns from left to right, keep the rest optimal."""
    (R, C), current = W.shape, W.clone()
    keep = torch.ones(R, C, dtype=torch.bool)
    step = pattern[1] if isinstance(pattern, tuple) else block
    for j in range(C):
        if j % step == 0:
            score = torch.stack([removal_costs(row, G) for row in current])[:, j:j + step]
            if isinstance(pattern, tuple):
                keep[:, j:j + step] = ref.keep_n_of_m(score, *pattern)
            else:
                keep[:, j:j + step] = ref.remove_lowest(score, ref.exact_count(score.numel(), pattern))
        current[:, j] *= keep[:, j]
        current = torch.stack([best_rest(W[i], current[i, :j + 1], G) for i in range(R)])
    return current, keep


# --- counting -----------------------------------------------------------------------------------------------


def test_counts_are_decimal():
    assert int(0.29 * 100) == 28 and ref.exact_count(100, 0.29) == 29
    assert ref.exact_count(100, "0.57") == 57
    assert [ref.exact_count(10, s) for s in (0, 0.0, 0.99, 1, 1.0)] == [0, 0, 9, 10, 10]


def test_ties_remove_the_lower_index_first():
    keep = ref.remove_lowest(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), 2)
    assert keep.tolist() == [[True, False], [False, True]]
    assert ref.magnitude(torch.ones(2, 4), 0.5)[1].tolist() == [[False] * 4, [True] * 4]
    X = torch.ones(3, 4)
    assert ref.wanda(torch.ones(2, 4), X, 0.5)[1].tolist() == [[False, False, True, True]] * 2
    assert ref.wanda(torch.ones(1, 4), X, (3, 4))[1].tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("s", [0, 0.29, 0.5, "0.7", 1.0])
@pytest.mark.parametrize("R, C, T, block", SHAPES)
def test_counts_per_group(R, C, T, block, s):
    W, X = problem(R, C, T)
    assert (~ref.magnitude(W, s)[1]).sum() == ref.exact_count(R * C, s)
    assert ((~ref.wanda(W, X, s)[1]).sum(1) == ref.exact_count(C, s)).all()
    W_hat, keep = ref.sparsegpt(W, X, s, block=block)
    for j in range(0, C, block):
        part = keep[:, j:j + block]
        assert (~part).sum() == ref.exact_count(part.numel(), s)
    assert (W_hat[~keep] == 0).all() and not torch.signbit(W_hat[~keep]).any()


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (4, 8), (0, 2), (4, 4)])
def test_counts_n_of_m(n, m):
    W, X = problem(5, 16, 40)
    for _, keep in (ref.magnitude(W, (n, m)), ref.wanda(W, X, (n, m)), ref.sparsegpt(W, X, (n, m))):
        assert (keep.reshape(5, -1, m).sum(-1) == n).all()


def test_n_of_m_must_divide():
    W, X = problem(2, 10, 20)
    for call in (lambda: ref.magnitude(W, (2, 4)), lambda: ref.wanda(W, X, (2, 4)),
                 lambda: ref.sparsegpt(W, X, (2, 4))):
        with pytest.raises(ValueError, match="width of 10"):
            call()


def test_zero_sparsity_is_the_identity_and_inputs_are_untouched():
    W, X = problem(4, 10, 30)
    W0, X0 = W.clone(), X.clone()
    results = ref.magnitude(W, 0), ref.wanda(W, X, 0), ref.sparsegpt(W, X, 0), ref.sparsegpt(W, X, (2, 2))
    for W_hat, keep in results:
        assert torch.equal(W_hat, W) and keep.all()
    ref.sparsegpt(W, X, 0.5)
    ref.sparsegpt(W, G=ref.gram(X), pattern=0.5)
    assert torch.equal(W, W0) and torch.equal(X, X0)


# --- the methods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [0.5, 0.7, (2, 4), (1, 4)])
def test_wanda_removes_the_cheapest_under_a_diagonal_gram(pattern):
    """With uncorrelated inputs a mask costs the sum of its squared scores: no other is cheaper."""
    W, X = problem(3, 8, 50)
    G = torch.diag(ref.gram(X).diagonal())
    W_hat, keep = ref.wanda(W, X, pattern)
    for i in range(3):
        k = int((~keep[i]).sum())
        costs = []
        for out in combinations(range(8), k):
            other = torch.ones(8, dtype=torch.bool)
            other[list(out)] = False
            if isinstance(pattern, float) or (other.reshape(-1, 4).sum(1) == pattern[0]).all():
                costs.append(ref.layer_error(W[i:i + 1], W[i:i + 1] * other, G))
        assert ref.layer_error(W[i:i + 1], W_hat[i:i + 1], G) == pytest.approx(min(costs), rel=1e-12)


def test_wanda_on_white_inputs_is_magnitude_per_row():
    W, _ = problem(3, 8, 1)
    keep = ref.wanda(W, G=torch.eye(8), pattern=0.5)[1]
    for i in range(3):
        assert torch.equal(keep[i:i + 1], ref.magnitude(W[i:i + 1], 0.5)[1])


def test_variant_by_hand():
    """Row sums 10: at alpha 0.4 the head 1, 2 (sum 3) stays below 4, 3 makes 6. Equal ones go together."""
    score = torch.tensor([[4.0, 1, 3, 2], [5, 2, 2, 1]], dtype=torch.float64)
    assert ref.variant_keep(score, 0.4).tolist() == [[True, False, True, False], [True, False, False, False]]
    assert ref.variant_keep(score, 0.3)[0].tolist() == [True, False, True, False]  # equal to the budget: goes
    assert ref.variant_keep(score, 0.05).all()
    W, X = score, torch.ones(1, 4)
    assert torch.equal(ref.wanda_variant(W, X, 0.625)[1], ref.variant_keep(score, 0.4))  # met at once
    assert ref.share_removed(ref.wanda_variant(W, X, 0.9)[1]) == Fraction(6, 8)  # 0.8 of the sum is the most


def test_variant_meets_the_target_on_many_weights():
    W, X = problem(60, 100, 300)
    for s in (0.3, 0.5, 0.7):
        W_hat, keep = ref.wanda_variant(W, X, s)
        assert abs(ref.share_removed(keep) - Fraction(str(s))) <= Fraction("0.001")
        assert torch.equal(W_hat[keep], W[keep])
        assert len(set(keep.sum(1).tolist())) > 1  # the rows' counts differ


@pytest.mark.parametrize("R, C, T, block", SHAPES)
@pytest.mark.parametrize("pattern", [0.29, 0.5, 0.7])
def test_sparsegpt_is_sequential_obs(R, C, T, block, pattern):
    W, X = problem(R, C, T, seed=1)
    check_against_obs(W, X, pattern, block)


@pytest.mark.parametrize("R, C, T", [(5, 12, 60), (3, 16, 7)])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_sparsegpt_n_of_m_is_sequential_obs(R, C, T, pattern):
    if C % pattern[1]:
        C = 16
    W, X = problem(R, C, T, seed=2)
    check_against_obs(W, X, pattern, 128)


def check_against_obs(W, X, pattern, block):
    G = ref.gram(X)
    G = G + 0.01 * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
    W_hat, keep = ref.sparsegpt(W, X, pattern, damping=0.01, block=block)
    W_obs, keep_obs = sequential_obs(W, G, pattern, block)
    assert torch.equal(keep, keep_obs)
    torch.testing.assert_close(W_hat, W_obs, **F64)


def test_sparsegpt_dead_inputs():
    """A dead input goes whole and changes nothing else, whatever the scale of the inputs."""
    dead, alive = [2, 7], [0, 1, 3, 4, 5, 6, 8, 9]
    W, X = problem(4, 10, 40, dead=dead)
    W_hat, keep = ref.sparsegpt(W, X, (1, 2))
    assert (W_hat[:, dead] == 0).all() and not keep[:, dead].any() and torch.isfinite(W_hat).all()
    full = ref.sparsegpt(W, X, 0.5, block=10)
    # 4 x 10 weights: 20 go, 8 of them the dead ones; the other 12 of 32 are chosen as if those were not there
    rest = ref.sparsegpt(W[:, alive], X[:, alive], 0.375, block=8)
    assert torch.equal(full[1][:, alive], rest[1])
    torch.testing.assert_close(full[0][:, alive], rest[0], **F64)
    for small, usual in zip(ref.sparsegpt(W, 1e-3 * X, 0.5, block=10), full, strict=True):
        torch.testing.assert_close(small, usual, **F64)
    assert not ref.sparsegpt(W, 0 * X, (1, 2))[0].any()


def test_gram_in_place_of_tokens():
    W, X = problem(4, 8, 30)
    for prune in (ref.wanda, ref.sparsegpt, ref.wanda_variant):
        for a, b in zip(prune(W, X, 0.5), prune(W, None, 0.5, G=ref.gram(X)), strict=True):
            torch.testing.assert_close(a, b, **F64)
        with pytest.raises(ValueError, match="either"):
            prune(W)


# --- error, values, support ---------------------------------------------------------------------------------


def test_layer_error_is_the_outputs_error():
    W, X = problem(4, 6, 20)
    W_hat, _ = ref.wanda(W, X, 0.5)
    direct = sum(((W - W_hat) @ x).square().sum() for x in X) / len(X)
    assert ref.layer_error(W, W_hat, ref.gram(X)) == pytest.approx(direct.item(), rel=1e-12)


@pytest.mark.parametrize("T", [40, 6])
def test_refit_gradient_is_zero_on_the_support(T):
    W, X = problem(4, 12, T)
    G = ref.gram(X)
    W_hat, keep = ref.sparsegpt(W, X, 0.5)
    fitted = ref.refit(W, keep, G)
    gradient = (W - fitted) @ G
    assert gradient[keep].abs().max() < 1e-9 * (W @ G).abs().max()
    assert (fitted[~keep] == 0).all()
    for other in (W_hat, ref.masked(W, keep), fitted + 1e-3 * keep):
        assert ref.layer_error(W, fitted, G) <= ref.layer_error(W, other, G)


def test_refit_is_least_squares_on_the_tokens():
    """The same from the tokens: regress X w on the kept columns of X."""
    W, X = problem(3, 8, 30)
    keep = ref.wanda(W, X, 0.5)[1]
    fitted = ref.refit(W, keep, ref.gram(X))
    for i in range(3):
        values = torch.linalg.lstsq(X[:, keep[i]], (X @ W[i]).unsqueeze(1)).solution.flatten()
        torch.testing.assert_close(fitted[i, keep[i]], values, **F64)


def test_refit_of_everything_and_nothing():
    W, X = problem(3, 8, 30)
    torch.testing.assert_close(ref.refit(W, torch.ones(3, 8, dtype=torch.bool), ref.gram(X)), W, **F64)
    assert not ref.refit(W, torch.zeros(3, 8, dtype=torch.bool), ref.gram(X)).any()


def test_bruteforce_is_never_beaten():
    W, X = problem(1, 8, 30)
    G = ref.gram(X)
    for k in range(9):
        w_hat, keep, error = ref.best_mask_bruteforce(W[0], G, k)
        assert keep.sum() == k and (w_hat[~keep] == 0).all()
        s = 1 - k / 8
        for other in (ref.magnitude(W, s), ref.wanda(W, X, s), ref.sparsegpt(W, X, s)):
            assert other[1].sum() == k
            assert error <= ref.layer_error(W, other[0], G) + 1e-12
    with pytest.raises(ValueError, match="12"):
        ref.best_mask_bruteforce(torch.ones(13), torch.eye(13), 2)
