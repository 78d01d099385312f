"""Laws of magnitude, Wanda and SparseGPT beyond the contract."""

import pytest
import reference as ref
import torch
from problems import layer, ref_pattern, statistics_of, white
from solving import case, run

from oneshot.prune.patterns import NM, Unstructured

F64 = {"rtol": 1e-8, "atol": 1e-10}
UNSTRUCTURED_AND_NM = [Unstructured(0.5), Unstructured(0.29), NM(2, 4), NM(3, 4)]


@pytest.mark.parametrize("pattern", UNSTRUCTURED_AND_NM, ids=str)
def test_white_inputs_make_wanda_magnitude_per_row(pattern):
    W, X = layer(6, 16, 1)[0], white(16)
    solution = run(case("wanda"), W, X, pattern)
    for i in range(6):
        assert torch.equal(solution.mask[i:i + 1], ref.magnitude(W[i:i + 1], ref_pattern(pattern))[1])
    assert torch.equal(solution.W_hat[solution.mask], W[solution.mask])


@pytest.mark.parametrize("pattern", UNSTRUCTURED_AND_NM, ids=str)
@pytest.mark.parametrize("block", [4, 16, 128])
def test_white_inputs_make_sparsegpt_magnitude_per_block(pattern, block):
    """Nothing can be made good: kept weights stay. Ties, too, are broken as in magnitude."""
    for W in (layer(6, 16, 1)[0], torch.ones(6, 16, dtype=torch.float64)):
        solution = run(case("sparsegpt", block_size=block), W, white(16), pattern)
        for j in range(0, 16, block):
            part = slice(j, j + block)
            assert torch.equal(solution.mask[:, part], ref.magnitude(W[:, part], ref_pattern(pattern))[1])
        assert torch.equal(solution.W_hat, ref.masked(W, solution.mask))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.7, "row"), NM(2, 4)], ids=str)
def test_on_strongly_correlated_inputs_more_knowledge_is_less_error(pattern, seed):
    W, X = layer(16, 160, 800, seed=seed)
    errors = [ref.layer_error(W, run(case(m), W, X, pattern).W_hat, ref.gram(X))
              for m in ("sparsegpt", "wanda", "magnitude")]
    assert errors[0] < 0.7 * errors[1] and errors[1] < 0.9 * errors[2]


@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("block", [5, 128])
def test_sparsegpt_with_a_mask_chosen_at_once(group, block):
    """Groups across all columns: the mask from the dense scores, then the best values from left to right."""
    W, X = layer(4, 13, 40)
    solution = run(case("sparsegpt", block_size=block), W, X, Unstructured(0.5, group))
    _, G = ref.dead_then_damped(W, ref.gram(X), 0.01)
    score = torch.stack([W[:, j] ** 2 / torch.linalg.inv(G[j:, j:])[0, 0] for j in range(13)], dim=1)
    keep = ref.remove_lowest(score, 26)
    if group == "row":
        keep = torch.stack([ref.remove_lowest(s, 6) for s in score])
    assert torch.equal(solution.mask, keep)
    best = W.clone()
    for j in range(13):  # columns up to j are settled; the rest take their best values, by a direct solve
        error = (best[:, j] * keep[:, j] - best[:, j]).unsqueeze(1)
        best[:, j] *= keep[:, j]
        best[:, j + 1:] -= torch.linalg.solve(G[j + 1:, j + 1:], G[j + 1:, j:j + 1] @ error.T).T
    torch.testing.assert_close(solution.W_hat, best, **F64)


def test_sparsegpt_nm_does_not_depend_on_the_block():
    W, X = layer(4, 120, 300)
    for pattern in (NM(2, 4), NM(3, 5), NM(7, 24)):
        usual = run(case("sparsegpt"), W, X, pattern)
        for block in (1, 7, 16, 1000):
            other = run(case("sparsegpt", block_size=block), W, X, pattern)
            assert torch.equal(other.mask, usual.mask)
            torch.testing.assert_close(other.W_hat, usual.W_hat, **F64)


def test_sparsegpt_block_is_the_group_unless_named():
    W, X = layer(4, 40, 90)
    named = run(case("sparsegpt"), W, X, Unstructured(0.5, 16))
    own = run(case("sparsegpt", block_size=16), W, X, Unstructured(0.5))
    assert torch.equal(named.mask, own.mask) and torch.equal(named.W_hat, own.W_hat)


def test_sparsegpt_singular_gram_says_so_for_every_linear_that_shares_it():
    statistics = statistics_of(torch.ones(9, 8), {"outer"})
    W = layer(4, 8, 1)[0].float()
    for _ in range(2):
        info = run(case("sparsegpt", damping=0.0), W, None, NM(2, 4), statistics).info
        assert info["damping"] == 0.01 and "damping raised from 0 to 0.01" in info.pop("warnings")[0]
    assert run(case("sparsegpt"), W, None, NM(2, 4), statistics).info == {"damping": 0.01, "warnings": []}


def test_sparsegpt_counts_dead_inputs_and_clears_their_weights():
    W, X = layer(4, 40, 90, dead=(3, 4))
    for pattern in (Unstructured(0.0), NM(2, 4)):
        solution = run(case("sparsegpt"), W, X, pattern)
        assert solution.info["dead_inputs"] == 2 and not solution.W_hat[:, 3:5].any()


@pytest.mark.parametrize("flags", [{"damping": -0.1}, {"damping": float("nan")}, {"block_size": 0}], ids=str)
def test_sparsegpt_flags_are_checked(flags):
    with pytest.raises(ValueError, match=f"^--sparsegpt.{next(iter(flags)).replace('_', '-')} "):
        case("sparsegpt", **flags)


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.7])
def test_wanda_variant_is_one_share_for_all_rows(sparsity):
    """The reference's mask at the alpha found, and nearly the one its own bisection (to 0.1 %) finds."""
    W, X = layer(40, 100, 300)
    solution = run(case("wanda", use_variant=True), W, X, Unstructured(sparsity))
    alpha = solution.info["alpha"]
    assert torch.equal(solution.mask, ref.variant_keep(ref.wanda_score(W, X), alpha * (1 + 1e-12)))
    assert int((~solution.mask).sum()) == ref.exact_count(4000, sparsity)
    assert (solution.mask != ref.wanda_variant(W, X, sparsity)[1]).sum() <= 4
    assert solution.mask.sum(1).unique().numel() > 1


def test_wanda_variant_leaves_nm_alone():
    W, X = layer(6, 40, 90)
    assert torch.equal(run(case("wanda", use_variant=True), W, X, NM(2, 4)).mask,
                       run(case("wanda"), W, X, NM(2, 4)).mask)
