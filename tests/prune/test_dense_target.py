"""What a layer aims at (`--dense-target`) and from which inputs (`--shared-inputs`), and the collapse alarm."""

import copy

import families
import pytest
import tiny
import torch
from jobs import BYTE, job_of, prune, tokens, weights_in

from oneshot import calibrate, models, report
from oneshot.calibrate import health
from oneshot.calibrate.statistics import Statistics
from oneshot.prune import linalg, shared_inputs
from oneshot.prune.patterns import NM, Unstructured
from oneshot.report import page
from oneshot.settings import presets


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(page, "_pictures", lambda records: [])


def records_of(place):
    return [report.read(path) for path in sorted((place / "runs").glob("*.json"))]


# --- the dense target ---------------------------------------------------------------------------------------


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


# --- shared inputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_shared_inputs_solve_each_linear_on_the_dense_models_inputs(name):
    """The first block sees the same inputs either way; further up every job is solved as if it were alone."""
    asked = [("sparsegpt", "2:4"), ("wanda", "0.6"), ("sparsegpt", "0.5")]
    model = families.tiny(name)
    before = copy.deepcopy(model.state_dict())
    jobs = [job_of(model, *a) for a in asked]
    solved = shared_inputs.prune_shared(model, tokens(), None, jobs)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for a, job, (result, weights) in zip(asked, jobs, solved, strict=True):
        own = families.tiny(name)
        prune(own, *a)
        [(_, alone)] = shared_inputs.prune_shared(model, tokens(), None, [job])
        assert len(result.layers) == len(weights) == len(list(models.all_weights(own)))
        for block in models.walk(own):
            for weight in block.weights:
                assert torch.equal(weights[weight.name], alone[weight.name])
                if block.number == 0:
                    torch.testing.assert_close(weights[weight.name], weight.get(), rtol=1e-4, atol=1e-5)


class Calls:
    """Counts the calls of a function that stands where it stood."""

    def __init__(self, monkeypatch, owner, name):
        self.n, self.real = 0, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.n += 1
        return self.real(*args, **kwargs)


def test_jobs_share_the_pass_and_the_factorisations(monkeypatch):
    """Two blocks, three batches, four tensors that feed seven linears, whatever the number of jobs."""
    model = families.tiny("llama")
    jobs = [job_of(model, method, pattern) for method, pattern in (
        ("sparsegpt", "2:4"), ("sparsegpt", "0.5"), ("sparsegpt+refit", "0.6"), ("wanda+refit", "0.7"))]
    for n in (1, len(jobs)):
        with monkeypatch.context() as patch:
            captured, collected = Calls(patch, calibrate, "capture"), Calls(patch, calibrate, "collect")
            passed = [Calls(patch, block, "forward") for block in models.blocks(model)[1]]
            factored, scaled = Calls(patch, linalg, "_upper_factor"), Calls(patch, linalg, "_unit_gram")
            shared_inputs.prune_shared(model, tokens(), None, jobs[:n])
        assert (captured.n, collected.n) == (1, 2)
        assert [p.n for p in passed] == [2 * 3 + 1, 2 * 3]  # to collect, to carry on; what the first one returns
        assert factored.n == 2 * 4 and scaled.n == (0 if n == 1 else 2 * 4)


@pytest.mark.parametrize("allocate", ["owl", "error"])
def test_one_dense_pass_allocates_for_all_shared_runs(tmp_path, monkeypatch, allocate):
    """One pass to allocate and one to solve for three patterns, and each gets the plan that it gets alone."""
    place = tiny.make(tmp_path)
    alone = {}
    for pattern in ("0.5", "0.6", "0.7"):
        assert tiny.main(*tiny.flags(place, "--no-dense", "--shared-inputs", pattern=pattern, allocate=allocate,
                                     results=place / f"alone-{pattern}")) == 0
        [record] = tiny.records(place / f"alone-{pattern}").values()
        alone[pattern] = [row["pattern"] for row in record["layers"]]
    passes = Calls(monkeypatch, shared_inputs, "start")
    assert tiny.main(*tiny.flags(place, "--no-dense", "--shared-inputs", pattern="0.5,0.6,0.7", allocate=allocate)) == 0
    assert passes.n == 2
    found = tiny.records(place / "runs")
    assert {p: [row["pattern"] for row in found["wanda", p]["layers"]] for p in alone} == alone


def test_shared_inputs_by_command_give_every_row_and_checkpoint(tmp_path):
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--shared-inputs", method="wanda,sparsegpt", pattern="2:4,0.6", save=place / "out")
    assert tiny.main(*argv) == 0
    records = records_of(place)
    assert len(records) == 5
    assert all(r["settings"]["shared_inputs"] for r in records if r["settings"]["method"] != "dense")
    assert {p.name for p in (place / "out").iterdir()} == {"wanda-2of4", "sparsegpt-2of4", "wanda-0.6", "sparsegpt-0.6"}
    again = {p: p.read_bytes() for p in (place / "runs").glob("*.json")}
    assert tiny.main(*argv) == 0
    assert again == {p: p.read_bytes() for p in (place / "runs").glob("*.json")}


@pytest.mark.parametrize("flag", ["--true-sequential", "--heal=block", "--dense-target=0.5", "--stop-on-collapse"])
def test_shared_inputs_refuse_what_needs_a_runs_own(tmp_path, capsys, flag):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--shared-inputs", flag, method="sparsegpt")) == 2
    assert "does not go with --shared-inputs" in capsys.readouterr().err


# --- the dense pass, allocation and presets by command --------------------------------------------------------


@pytest.mark.parametrize("allocate", ["owl", "arithmetic", "error"])
def test_allocation_by_command_meets_the_sparsity(tmp_path, allocate):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", pattern="0.6", allocate=allocate)) == 0
    [record] = records_of(place)
    rows = record["layers"]
    total, zeros = (sum(f(r) for r in rows) for f in (lambda r: r["shape"][0] * r["shape"][1],
                                                      lambda r: r["target_zeros"]))
    wanted = sum(Unstructured(0.6, "row").zeros(*r["shape"]) for r in rows)
    assert abs(zeros - wanted) <= sum(r["shape"][0] for r in rows) and zeros < total
    assert len({r["pattern"] for r in rows}) > 1 and record["settings"]["allocation"]


def test_mix_by_command_stays_within_its_bytes(tmp_path):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", allocate="mix", **{"mix.budget": 0.75})) == 0
    [record] = records_of(place)
    found = {r["pattern"] for r in record["layers"]}
    assert found == {"2:4", "dense"}
    assert 0.6 < record["bytes"]["stored"] / record["bytes"]["dense"] <= 0.75


@pytest.mark.parametrize("dtype, budget", [("float32", 0.54), ("bfloat16", 0.57)])
def test_mix_and_the_record_count_the_same_bytes(tmp_path, dtype, budget):
    """A budget just above 2:4 everywhere: 0.53125 of the dense bytes at 32 bits a weight, 0.5625 at 16."""
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", "--dtype", dtype, allocate="mix")
    assert tiny.main(*argv, "--mix.budget", budget) == 0
    [record] = records_of(place)
    assert budget - 0.02 < record["bytes"]["stored"] / record["bytes"]["dense"] <= budget


@pytest.mark.parametrize("more", [[], ["--shared-inputs"], ["--sensitivity", "linear"]])
def test_mix_leaves_dense_what_the_pattern_does_not_fit(tmp_path, more):
    """Hidden 32, MLP 48: 2:32 fits all but down_proj."""
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", *more, pattern="2:32", allocate="mix", **{"mix.budget": 0.7})
    assert tiny.main(*argv) == 0
    [record] = records_of(place)
    found = {(r["linear"] == "mlp.down_proj", r["pattern"]) for r in record["layers"]}
    assert {p for down, p in found if down} == {"dense"} and (False, "2:32") in found


def test_mix_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    place = tiny.make(tmp_path)
    monkeypatch.setattr(calibrate, "capture", lambda *args, **more: pytest.fail("calibrated"))
    argv = tiny.flags(place, "--no-dense", pattern="2:32", allocate="mix")
    assert tiny.main(*argv, "--mix.also", "8:32") == 2
    error = capsys.readouterr().err
    assert "--mix.also 8:32: model.layers.0.mlp.down_proj (32x48) can have none" in error and "add dense" in error
    assert tiny.main(*argv, "--mix.budget", "0.1") == 2
    assert "--mix.budget 0.1: the smallest choice of patterns takes" in capsys.readouterr().err


def test_the_dense_pass_sees_the_dense_model():
    model = families.tiny("llama")
    first = calibrate.capture(model, tokens(), batch_size=4)
    want = {}
    for block in models.walk(model):
        statistics, _, _ = calibrate.collect(block.module, first, block.number, block.weights, {"outer"})
        want |= {n: m.outer.clone() for n, m in statistics.items()}
        calibrate.replay(block.module, first, block.number)
    tight = job_of(model, gram_budget=BYTE).options  # one Gram matrix at a time
    found, portions = {}, []
    for block, weights, statistics in shared_inputs.dense_pass(model, tokens(), None, {"outer"}, tight):
        portions.append(block.name)
        found |= {w.name: statistics[w.name].outer.clone() for w in weights}
    assert portions == [f"model.layers.{b}" for b in (0, 1) for _ in range(4)]  # four inputs a block
    assert found.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(found[key], want[key])


@pytest.mark.parametrize("effort", presets.EFFORTS)
def test_every_effort_is_made_of_flags_that_exist(effort):
    from oneshot.settings import flags
    [cfg] = [c for c in flags.parse(["--method", "best", "--effort", str(effort), "--pattern", "2:4"]) if c.prunes]
    flags = presets.EFFORTS[effort][1]
    assert cfg.preset == f"best-{effort}" and cfg.method == flags["method"]
    for name, value in flags.items():
        part, dot, field = name.partition(".")
        owner = (cfg.solver | cfg.healing | cfg.allocation)[part] if dot else cfg
        assert getattr(owner, field or name) == value


def test_what_is_given_beside_a_preset_wins():
    from oneshot.settings import flags
    [cfg] = [c for c in flags.parse(["--method", "best", "--pattern", "2:4", "--heal", "block", "--block.steps", "7"])
             if c.prunes]
    assert list(cfg.healing) == ["block"] and cfg.healing["block"].steps == 7


@pytest.mark.parametrize("effort", [0, 6])
def test_unknown_effort(effort, capsys):
    from oneshot.pipeline import run
    assert run.main(["--method", "best", "--effort", str(effort)]) == 2
    assert f"--effort {effort}: give 1 to 5" in capsys.readouterr().err


# --- the collapse alarm -------------------------------------------------------------------------------------


def test_equal_outputs_are_sound():
    Y = torch.randn(2, 40, 16)
    values = health.compare(Y, Y)
    assert values["relative_error"] == 0 and values["norm_ratio"] == values["dimensions_ratio"] == 1
    assert not health.collapses(values)


def test_dimensions_count_directions():
    gen = torch.Generator().manual_seed(0)
    for d in (1, 3, 8):
        Q, _ = torch.linalg.qr(torch.randn(32, d, generator=gen))
        Y = torch.randn(4000, d, generator=gen) @ Q.T + 5  # a common offset is no dimension
        assert health.dimensions(Y) == pytest.approx(d, rel=0.1)
    assert health.dimensions(torch.ones(9, 4)) == 0


@pytest.mark.parametrize("broken, word", [
    (lambda Y: 0.1 * Y, "norm"), (lambda Y: Y.mean(-1, keepdim=True).expand_as(Y), "dimensions"),
    (lambda Y: Y.flip(0), "relative error"), (lambda Y: Y * float("nan"), "norm")])
def test_a_collapse_is_named(broken, word):
    Y = torch.randn(4, 30, 12, generator=torch.Generator().manual_seed(1))
    assert any(found.startswith(word) for found in health.collapses(health.compare(Y, broken(Y))))


def test_padding_is_not_looked_at():
    Y, rows = torch.randn(2, 6, 8), torch.ones(12, dtype=torch.bool)
    rows[[3, 4, 5]] = False
    broken = Y.clone()
    broken[0, 3:] = float("nan")
    assert not health.collapses(health.compare(Y, broken, rows))


def test_the_alarm_is_a_warning_and_may_stop_the_run(tmp_path, capsys):
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", method="magnitude", pattern="0.95")
    assert tiny.main(*argv) == 0
    [record] = records_of(place)
    assert any("collapsed" in w for w in record["warnings"])
    assert tiny.main(*argv, "--stop-on-collapse", "--save", str(place / "out")) == 2
    assert "--stop-on-collapse: model.layers." in capsys.readouterr().err
    assert not (place / "out" / "oneshot.json").exists()


def test_a_sound_run_has_no_alarm():
    result = prune(families.tiny("llama"), pattern=str(NM(3, 4)))
    assert not [w for w in result.warnings if "collapsed" in w]
    assert all("dimensions" in b for b in result.blocks)


def test_a_finished_shared_command_solves_nothing_again(tmp_path, monkeypatch):
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", "--shared-inputs", method="wanda", save=place / "out")
    assert tiny.main(*argv) == 0
    monkeypatch.setattr(shared_inputs, "prune_shared", lambda *args: pytest.fail("solved again"))
    assert tiny.main(*argv) == 0


def test_a_method_that_looks_at_no_data_can_share_inputs(tmp_path):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", "--shared-inputs", "--no-layer-errors", method="magnitude")) == 0


def test_effort_without_best_is_refused(capsys):
    assert tiny.main("--method", "alps", "--pattern", "2:4", "--effort", "3") == 2
    assert "--effort 3: goes with --method best" in capsys.readouterr().err


def test_python_refuses_a_target_that_the_method_cannot_aim_at(tmp_path):
    import oneshot
    model, _ = oneshot.load(str(tiny.make(tmp_path) / "model"))
    with pytest.raises(ValueError, match=r"--dense-target 0\.5: --method wanda"):
        oneshot.prune(model, method="wanda", dense_target=0.5, calibration=torch.ones(2, 8, dtype=torch.long))


def test_an_allocation_that_does_not_fit_a_pattern_is_refused_before_any_run(tmp_path, capsys):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, pattern="0.5,2:4", allocate="owl")) == 2
    assert "--allocate owl: spreads a sparsity" in capsys.readouterr().err and not (place / "runs").exists()


@pytest.mark.parametrize("method", ["best+refit", "wanda+best"])
def test_nothing_goes_before_or_behind_a_preset(method):
    with pytest.raises(ValueError, match=r"--method .*best is a whole recipe"):
        presets.expand(method, {})


def test_a_changed_preset_has_a_star():
    assert presets.expand("best", {})["preset"] == "best-3"
    assert presets.expand("best", {"nsamples": 4, "effort": 2})["preset"] == "best-2"
    for given in ({"heal": "block"}, {"distil.steps": 3}, {"dense_target": 0.1}, {"alps.rho": 0.3},
                  {"alps.refit_steps": 0}, {"distil.lr": 0.1}, {"allocate": "owl", "owl.spread": 0.1},
                  {"heal": "block", "block.lr": 0.1}, {"shared_inputs": True}):
        assert presets.expand("best", given)["preset"] == "best-3*", given


def test_a_flag_for_another_methods_part_is_no_star():
    from oneshot.settings import flags
    runs = flags.parse(["--method", "best,sparsegpt", "--pattern", "2:4", "--sparsegpt.damping", "0.1", "--no-dense"])
    assert [r.preset for r in runs] == ["best-3", None]
    runs = flags.parse(["--method", "best", "--effort", "1", "--pattern", "2:4", "--sparsegpt.damping", "0.1"])
    assert runs[0].preset == "best-1*"
