"""Mix: one of several patterns for each linear, within a budget of bytes."""

import json
from itertools import product

import numpy as np
import pytest
import reference as ref
from allocating import flat, method, model, same_blocks
from problems import layer, statistics_of

from oneshot.prune import allocate
from oneshot.prune.patterns import NM, Dense


def mixed(blocks, errors, **flags):
    """The plan for 2:4 and what else the flags name, from one error for each candidate of each linear."""
    module, cfg = method("mix", **flags)
    measured = {name: {str(p): e for p, e in zip(module.candidates(NM(2, 4), cfg), es, strict=True)}
                for name, es in zip(flat(blocks), errors, strict=True)}
    return module.plan(measured, blocks, NM(2, 4), cfg)


def spent(plan, blocks):
    return sum(plan[n].bytes(*linear.shape, linear.itemsize) for block in blocks for n, linear in block.items())


def dense_bytes(blocks):
    return sum(linear.R * linear.C * linear.itemsize for block in blocks for linear in block.values())


def test_mix_leaves_the_most_sensitive_dense():
    blocks = same_blocks(4, [(16, 64)])
    plan = mixed(blocks, [(0.2, 0.0), (0.9, 0.0), (0.1, 0.0), (0.5, 0.0)], budget=0.8)
    assert [str(p) for p in plan.values()] == ["2:4", "dense", "2:4", "dense"]
    assert spent(plan, blocks) == dense_bytes(blocks) * (2 + 2 * 0.5625) / 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.57, 0.7, 0.9, 1.0])
def test_mix_is_within_budget_and_near_the_best(seed, budget):
    """Against all choices: what is lost to the best is at most one step of one linear, the greedy's known bound."""
    rng = np.random.default_rng(seed)
    blocks = model(*[[(int(r) * 4, int(c) * 8)] for r, c in rng.integers(1, 6, (5, 2))])
    errors = np.sort(rng.uniform(0, 1, (5, 3)), axis=1)[:, ::-1]
    errors[:, 2] = 0
    flags = {"also": "6:8,dense", "budget": budget}
    plan = mixed(blocks, errors.tolist(), **flags)
    module, cfg = method("mix", **flags)
    possible, shapes = module.candidates(NM(2, 4), cfg), list(flat(blocks).values())
    n = [R * C for R, C in shapes]

    def error(choice):
        return sum(n[i] * errors[i][p] for i, p in enumerate(choice))

    limit = budget * dense_bytes(blocks)
    within = [c for c in product(range(3), repeat=5)
              if sum(possible[p].bytes(*shapes[i], 2) for i, p in enumerate(c)) <= limit]
    got = [possible.index(p) for p in plan.values()]
    assert spent(plan, blocks) <= limit and tuple(got) in within
    assert error(got) - min(map(error, within)) <= max(n[i] * errors[i][0] for i in range(5))
    if budget == 1.0:
        assert got == [2] * 5


def test_mix_on_a_model():
    """Measured; a width that 4 does not divide can only stay dense, the reference's errors otherwise."""
    module, cfg = method("mix", budget=0.8, also="4:8,dense")
    blocks = model([(6, 40), (6, 40)], [(9, 30)])
    problems = {name: layer(*shape, 90, seed=i) for i, (name, shape) in enumerate(flat(blocks).items())}
    linears = {name: (lambda W=W: W, statistics_of(X, module.needs)) for name, (W, X) in problems.items()}
    measured = module.measure(linears, NM(2, 4), cfg)
    json.dumps(measured)
    W, X = problems["layers.0.0"]
    G = ref.gram(linears["layers.0.0"][1].sample)
    for text, pattern in (("2:4", (2, 4)), ("4:8", (4, 8)), ("dense", 0.0)):
        want = ref.layer_error(W, ref.wanda(W, X, pattern)[0], G) / ref.layer_error(W, 0 * W, G)
        assert measured["layers.0.0"][text] == pytest.approx(want, abs=1e-12)
    assert measured["layers.1.0"] == {"dense": 0.0}
    plan = module.plan(measured, blocks, NM(2, 4), cfg)
    assert isinstance(plan["layers.1.0"], Dense) and spent(plan, blocks) <= 0.8 * dense_bytes(blocks)


def test_mix_counts_each_linear_in_its_own_dtype():
    """2:4 keeps 0.5625 of 16 bits a weight, 0.53125 of 32; a linear of four bytes weighs twice one of two."""
    blocks = [{"a": allocate.Linear(16, 64, 4), "b": allocate.Linear(16, 64, 2)}]
    errors = [(0.3, 0.0), (0.2, 0.0)]
    assert [str(p) for p in mixed(blocks, errors, budget=0.7).values()] == ["2:4", "dense"]
    limit = (0.53125 * 2 + 0.5625) / 3
    assert [str(p) for p in mixed(blocks, errors, budget=limit + 1e-6).values()] == ["2:4", "2:4"]
    with pytest.raises(ValueError, match=r"--mix.budget 0.54: the smallest choice of patterns takes 0.5417"):
        mixed(blocks, errors, budget=0.54)


def test_mix_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"--mix.budget 0.5: the smallest choice of patterns takes 0.5625"):
        mixed(same_blocks(2, [(16, 64)]), [(0.2, 0.0)] * 2, budget=0.5)
    module, cfg = method("mix", also="4:8")
    with pytest.raises(ValueError, match=r"--mix.also 4:8: layers.0.0 \(3x30\) can have none"):
        module.plan({}, model([(3, 30)]), NM(2, 4), cfg)


def test_mix_never_takes_more_bytes_for_more_error():
    """4:8 takes fewer bytes than 2:4 in the format of the kernels, and loses less: 2:4 is then never chosen."""
    plan = mixed(same_blocks(3, [(16, 64)]), [(0.3, 0.2, 0.0)] * 3, also="4:8,dense", budget=0.71)
    assert {str(p) for p in plan.values()} == {"4:8", "dense"}
