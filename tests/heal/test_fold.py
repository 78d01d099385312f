"""Fold against least squares written out: the weights, the choice of the ridge, what is skipped and said."""

from dataclasses import replace

import families
import jobs
import pytest
import torch

from oneshot import calibrate, heal, models
from oneshot.heal import fold
from oneshot.prune import loop
from oneshot.prune.options import Options

OPTIONS = Options(batch_size=4, device="cpu", progress=False)
HELD = (1, 5, 9)


def folded(model, zero=(), mask=None, dropped=(), **cfg):
    """(the report on block 0, W before, W after, its activations, the targets) of a fold with some columns zero."""
    ids = jobs.tokens(12)
    dense = loop.start(model, ids, mask, OPTIONS, HELD)
    activations = dense.fork()
    block = next(models.walk(model, "cpu"))
    calibrate.replay(block.module, dense, 0)
    loop.pass_dropped(model, replace(jobs.job_of(model), dropped=frozenset(dropped)), dense, 0)
    W = block.module.mlp.down_proj.weight
    W.data[:, list(zero)] = 0
    before = W.data.clone()
    healer = fold.Heal(fold.Config(**cfg))
    healer.skips = frozenset(dropped)
    info = healer.after_block(block, activations, dense.hidden)
    return info, before, W.data.clone(), activations, dense.hidden


def naive(model, before, activations, targets, kept, ridge):
    """(ΔW over the kept columns, weighted error on held-out windows before and after), float64, token by token."""
    block = models.blocks(model)[1][0]
    W = block.mlp.down_proj.weight
    now = W.data.clone()
    W.data.copy_(before)
    parts = {False: ([], [], []), True: ([], [], [])}
    for i, held in enumerate(activations.held):
        seen = []
        handle = block.mlp.down_proj.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].flatten(0, 1)))
        out = calibrate.forward(block, activations, 0, i).flatten(0, 1)
        handle.remove()
        real = slice(None) if activations.rows[i] is None else activations.rows[i]
        for store, t in zip(parts[held], (seen[0], out, targets[i].flatten(0, 1)), strict=True):
            store.append(t[real].double())
    W.data.copy_(now)
    h, out, D = (torch.cat(t) for t in parts[False])
    w = 1 / D.square().sum(1, keepdim=True)
    h = h[:, kept]
    G, B = (h * w).T @ h / len(h), ((D - out) * w).T @ h / len(h)
    change = torch.linalg.solve(G + ridge * G.diagonal().mean() * torch.eye(len(kept)), B.T).T
    h, out, D = (torch.cat(t) for t in parts[True])
    w = 1 / D.square().sum(1)
    errors = [float((R.square().sum(1) * w).mean()) for R in (D - out, D - out - h[:, kept] @ change.T)]
    return change, errors


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dropped", [(), (1,)])
def test_it_is_weighted_least_squares_with_the_best_ridge(padded, dropped):
    model, zero = families.tiny("llama"), range(0, 48, 3)
    mask = torch.ones(12, families.T, dtype=torch.bool)
    mask[::2, 15:] = False
    info, before, after, activations, targets = folded(model, zero, mask if padded else None, dropped)
    kept = [i for i in range(48) if i not in zero]
    errors = {}
    for ridge in fold.RIDGES:
        change, (start, errors[ridge]) = naive(model, before, activations, targets, kept, ridge)
        if ridge == info["ridge"]:
            torch.testing.assert_close(after[:, kept], (before[:, kept] + change).float(), rtol=1e-3, atol=1e-5)
            assert info["held_out_before"] == pytest.approx(start, rel=1e-4)
            assert info["held_out_after"] == pytest.approx(errors[ridge], rel=1e-3)
    assert info["ridge"] == min(errors, key=errors.get) and info["held_out_after"] < info["held_out_before"]
    assert not after[:, list(zero)].any()


def test_single_zeros_stay_zero_unless_whole_columns_go():
    for columns in (False, True):
        model = families.tiny("llama")
        model.model.layers[0].mlp.down_proj.weight.data[3, 5] = 0
        real, fold.Heal.columns = fold.Heal.columns, columns
        try:
            info, _, after, *_ = folded(model, (1, 2))
        finally:
            fold.Heal.columns = real
        assert info["ridge"] and bool(after[3, 5]) == columns and not after[:, 1].any()


def test_where_nothing_is_missing_nothing_changes():
    info, before, after, *_ = folded(families.tiny("llama"))
    assert torch.equal(before, after) or info["held_out_after"] < info["held_out_before"]


def test_only_before_dropped_blocks_if_asked():
    healer = fold.Heal(fold.Config(everywhere=False))
    healer.skips = frozenset({2})
    model = families.tiny("llama")
    block = next(models.walk(model, "cpu"))
    assert healer.after_block(block, None, []) is None


def test_on_a_mask_each_row_is_solved_on_its_own_weights():
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(40, 8, generator=gen, dtype=torch.float64)
    A, B = X.T @ X, torch.randn(3, 8, generator=gen, dtype=torch.float64)
    mask = torch.rand(3, 8, generator=gen) > 0.4
    found = fold.on_mask(A, B, mask)
    for row, b, keep in zip(found, B, mask, strict=True):
        torch.testing.assert_close(row[keep], torch.linalg.solve(A[keep][:, keep], b[keep]), rtol=1e-6, atol=1e-9)
        assert not row[~keep].any()


def test_what_cannot_be_folded_is_said():
    for name, why in (("gemma2", "as it is"), ("mixtral", "no single linear")):
        model = families.tiny(name)
        result = jobs.prune(model, "wanda", ids=jobs.tokens(12), healers=[fold.Heal(fold.Config())], held_out=HELD)
        assert any("not folded" in w and why in w for w in result.warnings)
    model = families.tiny("llama")
    result = jobs.prune(model, "wanda", ids=jobs.tokens(12), healers=[fold.Heal(fold.Config())])
    assert any("no window is held out" in w for w in result.warnings)
    assert "fold" in heal.names()


def test_it_computes_as_the_model_does_and_looks_at_a_block_once(monkeypatch):
    """Whether a block writes plainly is asked in float32, once for all cuts that a search walks through."""
    seen, asked, real, plainly = [], [], torch.nn.Linear.forward, fold.writes_plainly
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda own, x: seen.append(x.dtype) or real(own, x))

    def asks(*given):
        before = len(seen)
        asked.append(plainly(*given))
        assert set(seen[before:]) == {torch.float32}
        del seen[before:]
        return asked[-1]
    monkeypatch.setattr(fold, "writes_plainly", asks)
    model = families.tiny("llama", dtype=torch.bfloat16)
    models.compute_as_stored(model)
    healer = fold.Heal(fold.Config())
    for _ in range(2):
        dense = loop.start(model, jobs.tokens(12), None, OPTIONS, HELD)
        for block in models.walk(model, "cpu"):
            activations = dense.fork()
            calibrate.replay(block.module, dense, block.number)
            block.module.mlp.down_proj.weight.data[:, :9] = 0
            assert "held_out_before" in healer.after_block(block, activations, dense.hidden)
    assert asked == [True, True] and set(seen) == {torch.bfloat16}
