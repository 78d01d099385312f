"""The dense target (`--dense-target`): what a layer aims at, and which layers cannot."""

import copy

import families
import pytest
import tiny
import torch
from jobs import BYTE, prune, tokens, weights_in

import oneshot
from oneshot import calibrate, models
from oneshot.calibrate.statistics import Statistics
from oneshot.prune import linalg


def test_target_is_the_ridge_regression_on_the_dense_output():
    gen = torch.Generator().manual_seed(0)
    W, X, X_dense = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((5, 8), (200, 8), (200, 8)))
    statistics = Statistics(8, {"outer", "cross"}, dtype=torch.float64)
    for x, d in zip(X.split(60), X_dense.split(60), strict=True):
        statistics.update(x, d)
    G = X.T @ X / 200
    A = G + 0.01 * G.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    for share in (0.5, 1.0):
        want = W + share * W @ ((X_dense - X).T @ X / 200) @ torch.linalg.inv(A)
        torch.testing.assert_close(linalg.towards_dense(W, statistics, share)[0], want, rtol=1e-9, atol=1e-9)


def test_equal_inputs_leave_the_target_alone():
    W, X = torch.randn(3, 6), torch.randn(50, 6)
    statistics = Statistics(6, {"outer", "cross"})
    statistics.update(X, X)
    assert torch.equal(linalg.towards_dense(W, statistics, 1.0)[0], W)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom", "falcon-new"])
@pytest.mark.parametrize("sequential", [False, True])
def test_aiming_at_the_dense_model_brings_its_outputs_nearer(name, sequential):
    def distance(share):
        model, dense = families.tiny(name), families.tiny(name)
        prune(model, dense_target=share, true_sequential=sequential)
        with torch.no_grad():
            a, b = (m(tokens(), use_cache=False).logits for m in (model, dense))
        return float((a - b).square().mean())
    assert distance(0.5) < distance(0.0)


def test_cross_statistics_compare_the_same_tokens_of_both_models():
    model = families.tiny("llama")
    _, block_list = models.blocks(model)
    activations = calibrate.capture(model, tokens(), batch_size=4)
    dense, block, teacher = activations.fork(), block_list[0], copy.deepcopy(block_list[0])
    activations.hidden = [h + 0.1 * torch.randn_like(h) for h in activations.hidden]
    seen = {"pruned": [], "dense": []}
    for key, b, s in (("pruned", block, activations), ("dense", teacher, dense)):
        handle = b.mlp.down_proj.register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0].clone()))
        for i in range(len(s)):
            calibrate.forward(b, s, 0, i)
        handle.remove()
    statistics, _, _ = calibrate.collect(block, activations, 0, weights_in(block), {"outer", "cross"},
                                         dense=(teacher, dense))
    x, d = (torch.cat(seen[key]).reshape(-1, 48) for key in ("pruned", "dense"))
    torch.testing.assert_close(statistics["mlp.down_proj"].cross, (d - x).T @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name, experts", [("mixtral", 2), ("deepseek_v3", 1), ("qwen2_moe", 2), ("gpt_oss", 2)])
def test_experts_keep_their_own_target_and_the_rest_aims(name, experts):
    """`experts`: blocks with them. Nothing dies half-way, one warning names them all, attention is moved."""
    aimed, plain, done = families.tiny(name), families.tiny(name), []
    result = prune(aimed, dense_target=0.5, on_block=lambda b, *_: done.append(b))
    prune(plain)
    own = {row["name"] for row in result.layers if row["info"].get("dense_target") == 0.0}
    fused = {w.name for w in models.all_weights(aimed) if w.expert is not None}
    idle = {n for n in fused if any(n in w and "no calibration token" in w for w in result.warnings)}
    assert done == [0, 1] and own == fused - idle and len({n.split(".")[2] for n in own}) == experts
    [warning] = [w for w in result.warnings if w.startswith("dense target 0.5")]
    assert f"{len(own)} of {len(result.layers)} linears" in warning
    moved = {w.name for w, u in zip(models.all_weights(aimed), models.all_weights(plain), strict=True)
             if not torch.equal(w.get(), u.get())}
    attention = {w.name for w in models.all_weights(aimed) if "attn" in w.name and w.name.split(".")[2] == "1"}
    assert attention and attention <= moved  # block 0's inputs are the dense model's


def test_a_dense_target_helps_a_mixture_of_experts():
    def distance(share):
        model, dense = families.tiny("mixtral"), families.tiny("mixtral")
        prune(model, dense_target=share)
        with torch.no_grad():
            a, b = (m(tokens(), use_cache=False).logits for m in (model, dense))
        return float((a - b).square().mean())
    assert distance(0.5) < distance(0.0)


class Routed(torch.nn.Module):
    """Experts as code from a model's own repository has them: plain linears, each fed the tokens routed to it."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, x):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (x[..., 0] > 0) == bool(e)
            out[rows] = expert(x[rows])
        return out


def test_experts_made_of_linears_are_not_compared_either():
    model = families.tiny("llama")
    for block in models.blocks(model)[1]:
        block.mlp = Routed(block.mlp)
    result = prune(model, dense_target=0.5)
    own = {row["name"] for row in result.layers if row["info"].get("dense_target") == 0.0}
    assert own == {w.name for w in models.all_weights(model) if ".experts." in w.name}
    assert sum("12 of 20 linears" in w for w in result.warnings) == 1


def test_experts_aim_at_nothing_under_a_budget_and_true_sequentially():
    tight = prune(families.tiny("mixtral"), dense_target=0.5, gram_budget=BYTE)
    staged = prune(families.tiny("mixtral"), dense_target=0.5, true_sequential=True)
    for result in (tight, staged):
        assert len([w for w in result.warnings if w.startswith("dense target")]) == 1
        assert {row["info"].get("dense_target", 0.5) for row in result.layers if "attn" in row["name"]} == {0.5}


def test_methods_that_keep_weights_as_they_are_refuse_it(tmp_path, capsys):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, dense_target=0.5)) == 2
    assert "--dense-target 0.5: --method wanda leaves the weights" in capsys.readouterr().err
    assert tiny.main(*tiny.flags(place, method="sparsegpt", dense_target=1.5)) == 2
    assert "share from 0 to 1" in capsys.readouterr().err


def test_python_refuses_a_target_that_the_method_cannot_aim_at(tmp_path):
    model, _ = oneshot.load(str(tiny.make(tmp_path) / "model"))
    with pytest.raises(ValueError, match=r"--dense-target 0\.5: --method wanda"):
        oneshot.prune(model, method="wanda", dense_target=0.5, calibration=torch.ones(2, 8, dtype=torch.long))
