"""Divergence against full float64 logits of both models, computed plainly."""

import math

import pytest
import tiny
import torch
from tiny import plain_pages  # noqa: F401

from oneshot import models
from oneshot.measure import compared, divergence, losses
from oneshot.measure.losses import token_losses


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(changed model, dense model): the same random model, its weights moved in the first."""
    folder = tiny.save_model(tmp_path_factory.mktemp("pair"))
    changed, dense = models.load(folder)[0], models.load(folder)[0]
    draw = torch.Generator().manual_seed(0)
    for p in changed.parameters():
        p += 0.05 * torch.randn(p.shape, generator=draw)
    return changed, dense


def windows(n=7, seed=0):
    return torch.randint(3, 20, (n, tiny.WINDOW), generator=torch.Generator().manual_seed(seed))


def padding():
    """bool (7, WINDOW): windows of different lengths, padded at the end."""
    lengths = torch.tensor([16, 3, 9, 16, 2, 5, 12])
    return torch.arange(tiny.WINDOW) < lengths[:, None]


def plainly(model, dense, ids, mask):
    """Every quantity from one forward of each model and plain loops: lists over the predicted tokens."""
    found = {"kl": [], "loss": [], "dense_loss": [], "agree": [], "right": [], "dense_right": []}
    for row, real in zip(ids, mask, strict=True):
        n = int(real.sum())
        with torch.no_grad():
            q, p = (m(row[None, :n]).logits[0].double() for m in (model, dense))
        for t in range(n - 1):
            log_q, log_p = (x[t] - x[t].exp().sum().log() for x in (q, p))
            target = int(row[t + 1])
            found["kl"].append(sum(log_p[v].exp() * (log_p[v] - log_q[v]) for v in range(len(log_p))).item())
            found["loss"].append(-log_q[target].item())
            found["dense_loss"].append(-log_p[target].item())
            found["agree"].append(int(log_q.argmax()) == int(log_p.argmax()))
            found["right"].append(int(log_q.argmax()) == target)
            found["dense_right"].append(int(log_p.argmax()) == target)
    return found


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("slices", [1, 2**23], ids=["a position at a time", "all at once"])
def test_every_token_as_computed_plainly(pair, masked, slices, monkeypatch):
    monkeypatch.setattr(compared, "SLICE", slices)
    ids, mask = windows(), padding() if masked else None
    got = compared.compare(*pair, ids, mask, batch_size=3)
    whole = padding() if masked else torch.ones_like(ids, dtype=torch.bool)
    want = plainly(*pair, ids, whole)
    assert torch.equal(got.real, whole[:, 1:] & whole[:, :-1])
    for key in ("kl", "loss", "dense_loss"):
        torch.testing.assert_close(getattr(got, key)[got.real], torch.tensor(want[key]), rtol=1e-4, atol=1e-6)
        assert not getattr(got, key)[~got.real].any()
    for key in ("agree", "right", "dense_right"):
        assert getattr(got, key)[got.real].tolist() == want[key]
    assert sum(want["kl"]) > 0.01 * len(want["kl"]) and 0 < sum(want["agree"]) < len(want["agree"])


def test_metrics_as_computed_plainly(pair):
    ids = windows(40)
    values, how = divergence.metrics(compared.compare(*pair, ids), "text")
    want = plainly(*pair, ids, torch.ones_like(ids, dtype=torch.bool))
    n = len(want["kl"])
    lost = sum(d and not r for d, r in zip(want["dense_right"], want["right"], strict=True)) / n
    gained = sum(r and not d for d, r in zip(want["dense_right"], want["right"], strict=True)) / n
    assert values == {
        "text/kl": pytest.approx(sum(want["kl"]) / n, rel=1e-5),
        "text/kl_p99": pytest.approx(sorted(want["kl"])[math.ceil(0.99 * n) - 1], rel=1e-4),
        "text/top1_agreement": sum(want["agree"]) / n, "text/flips": pytest.approx(lost + gained)}
    assert (how["text/flips"]["right_to_wrong"], how["text/flips"]["wrong_to_right"]) == (lost, gained)
    assert lost and gained and all(h["tokens"] == n and h["windows"] == 40 and h["window"] == tiny.WINDOW
                                   for h in how.values())
    means = torch.tensor(want["kl"]).view(40, -1).mean(1)  # equal windows: the standard error of their means
    assert how["text/kl"]["stderr"] == pytest.approx((means.std() / 40**0.5).item(), rel=1e-4)


def test_a_model_does_not_differ_from_itself(tmp_path):
    folder = tiny.save_model(tmp_path)
    got = compared.compare(models.load(folder)[0], models.load(folder)[0], windows(), padding())
    assert not got.kl.any() and torch.equal(got.loss, got.dense_loss)
    values, _ = divergence.metrics(got, "t")
    assert values == {"t/kl": 0, "t/kl_p99": 0, "t/top1_agreement": 1, "t/flips": 0}


def test_losses_are_those_of_perplexity(pair):
    """So a run's perplexity does not depend on whether it is compared."""
    got = compared.compare(*pair, windows(), padding(), batch_size=2)
    assert torch.equal(got.loss, token_losses(pair[0], windows(), padding(), batch_size=2))


@pytest.mark.parametrize("cached", [1, 200])
def test_how_many_logits_a_cache_holds_changes_no_bit(pair, cached, monkeypatch):
    whole = compared.compare(*pair, windows(), padding(), batch_size=2)
    alone = token_losses(pair[0], windows(), padding(), batch_size=2)
    monkeypatch.setattr(losses, "CACHED", cached)  # a position, or some, at a time
    parts = compared.compare(*pair, windows(), padding(), batch_size=2)
    assert all(torch.equal(getattr(parts, key), getattr(whole, key)) for key in vars(whole))
    assert torch.equal(token_losses(pair[0], windows(), padding(), batch_size=2), alone)


def test_groups_and_batches_do_not_matter(pair, monkeypatch):
    whole = compared.compare(*pair, windows(), batch_size=7)
    monkeypatch.setattr(compared, "GROUP_BYTES", 1)
    parts = compared.compare(*pair, windows(), batch_size=2)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-4, atol=1e-6)


def test_the_models_are_left_as_they_were(pair):
    blocks = [list(models.blocks(m)[1]) for m in pair]
    compared.compare(*pair, windows())
    assert [list(models.blocks(m)[1]) for m in pair] == blocks
    with pytest.raises(ValueError, match="second time"):
        compared.compare(pair[0], pair[0], windows())


def test_mean_over_windows_of_unequal_size():
    """Against a bootstrap over windows."""
    draw = torch.Generator().manual_seed(0)
    member = torch.rand(60, 30, generator=draw) < torch.rand(60, 1, generator=draw)
    values = torch.randn(60, 30, generator=draw) + torch.randn(60, 1, generator=draw)  # windows hang together
    mean, stderr = compared.mean_over_windows(values, member)
    assert mean == pytest.approx(values[member].mean().item(), abs=1e-6)
    again = [values[i][member[i]].mean().item() for i in torch.randint(60, (1000, 60), generator=draw)]
    assert stderr == pytest.approx(torch.tensor(again).std().item(), rel=0.15)
    assert stderr > 2 * (values[member].std() / member.sum() ** 0.5).item(), "tokens taken as independent"
    assert compared.mean_over_windows(values[:1], member[:1])[1] is None


@pytest.mark.usefixtures("plain_pages")
def test_a_run_records_it(tmp_path, capfd):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--divergence")) == 0
    found = tiny.records(place / "runs")
    pruned, dense = found["wanda", "2:4"]["metrics"], found["dense", "dense"]["metrics"]
    assert set(dense) == {"evaluation/ppl"}
    assert set(pruned) == {f"evaluation/{key}" for key in ("ppl", "kl", "kl_p99", "top1_agreement", "flips")}
    assert 0 < pruned["evaluation/kl"] < pruned["evaluation/kl_p99"]
    assert "evaluation kl @16" in capfd.readouterr().out
    assert tiny.main(*tiny.flags(place, "--divergence", evaluate="none")) == 2
    assert "--divergence: needs a text to compare on" in capfd.readouterr().err


def test_a_constant_model_passes_its_blocks_once_and_gives_the_same_numbers(pair, monkeypatch):
    ids, mask, passed = windows(), padding(), []
    want = [compared.compare(*pair, ids, mask, batch_size=2), compared.compare(*pair, ids, batch_size=2)]
    real = compared.through_blocks
    monkeypatch.setattr(compared, "through_blocks", lambda m, *args: passed.append(m) or real(m, *args))
    compared.constant(pair[1])
    for _ in range(2):
        got = [compared.compare(*pair, ids, mask, batch_size=2), compared.compare(*pair, ids, batch_size=2)]
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.kl, b.kl) and torch.equal(a.dense_loss, b.dense_loss) and torch.equal(a.loss, b.loss)
    assert sum(m is pair[1] for m in passed) == 2 and sum(m is pair[0] for m in passed) == 4


def test_what_is_kept_of_a_constant_model_is_limited(pair, monkeypatch):
    passed, real = [], compared.through_blocks
    monkeypatch.setattr(compared, "KEPT", 10)
    monkeypatch.setattr(compared, "through_blocks", lambda m, *args: passed.append(m) or real(m, *args))
    compared.constant(pair[1])
    for _ in range(2):
        compared.compare(*pair, windows(), batch_size=7)
    assert sum(m is pair[1] for m in passed) == 2
