"""scripts/bench/best.py and its tables: the yardstick is SparseGPT the published way, shares are what their definition
says, a row is measured once.
"""

import copy
import json
import math
import re
import types

import alps
import best
import best_rows
import best_table
import families
import pytest
import tables
import tiny
import torch

from oneshot import data, settings
from oneshot.pipeline import checks
from oneshot.prune.patterns import parse
from oneshot.settings import presets


def plain(text):
    """A table without its padding."""
    return re.sub(" +", " ", text)


def test_conv1d_as_linear_is_the_same_model():
    model, ids = families.tiny("gpt2"), torch.arange(3, 27).repeat(2, 1)
    want = model(ids, use_cache=False).logits
    linears = best.as_linears(copy.deepcopy(model))
    assert any(isinstance(m, torch.nn.Linear) for m in linears.transformer.h[0].modules())
    torch.testing.assert_close(linears(ids, use_cache=False).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_yardstick_prunes_every_block_of_a_copy(monkeypatch, name, pattern):
    model, seen = families.tiny(name), []
    before = copy.deepcopy(model.state_dict())
    real = best.published.prune_block

    def look(block, *args):
        out = real(block, *args)
        seen.extend(float((p == 0).float().mean()) for p in block.parameters() if p.ndim == 2)
        return out
    monkeypatch.setattr(best.published, "prune_block", look)
    ids = torch.randint(3, families.VOCAB, (4, families.T), generator=torch.Generator().manual_seed(0))
    assert min(best.published_seconds(model, data.given(ids), parse(pattern))) > 0
    assert len(seen) == 2 * {"gpt2": 4, "llama": 7}[name]
    assert all(s == pytest.approx(parse(pattern).zeros(10, 100) / 1000, abs=0.01) for s in seen)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def row(way, ppl, seed=0, seconds=1.0):
    return {"model": "stories260k", "seed": seed, "pattern": "2:4", "way": way, "dense_ppl": math.e, "ppl": ppl,
            "cpu_seconds": seconds, "published_cpu_seconds": 2.0, "metric": "t/ppl", "window": 8, "tokens": 9,
            "errors": {"o": 0.5 if way == "sparsegpt" else 0.2}}


def test_share_and_cost():
    """SparseGPT loses 2 nats; a way that loses 1.5 removes a quarter."""
    rows = [row("sparsegpt", math.e**3), row("best-3", math.e**2.5, seconds=8.0), row("alps", math.e**2, seed=1)]
    found = best_rows.shares(rows)
    assert found["stories260k", "2:4", "best-3"] == [(pytest.approx(0.25), 4.0, pytest.approx(math.e**2.5))]
    assert ("stories260k", "2:4", "alps") not in found  # its seed has no SparseGPT


def test_layer_errors_stand_beside_sparsegpts():
    rows = [row("sparsegpt", 9.0), row("alps", 8.0), row("best-3", 7.0)]
    text = plain("\n".join(best_table.error_table(rows, "2:4")))
    assert "| o | 0.5000 | 0.40x |" in text and "best-3" not in text
    assert not any("| o " in line for line in best_table.error_table([row("alps", 8.0)], "2:4"))


def test_the_readme_shows_what_best_gains_and_costs(tmp_path):
    rows = [row("sparsegpt", math.e**3, seed) for seed in range(3)]
    rows += [*(row("best-3", math.e**2.5, seed, seconds=8.0) for seed in range(3)), row("best-5", math.e**2)]
    for r in rows:
        r |= {"recipe": best_rows.recipes()[r["way"]], "environment": {
            "device": "cpu", "threads": 1, "torch": "2", "transformers": "5", "commit": "abc", "dirty": False}}
    rows[-1] |= {"recipe": {"method": "another"}}  # from before the preset was changed
    rows.append({**rows[0], "way": "a way of old"})
    rows[3]["version"] = rows[4]["version"] = best.WAYS["version"]
    for r in rows:
        best.store(tmp_path / "results" / "best" / "stories260k.json", r)
    text = tables.with_best("before\n", tmp_path)
    shown = plain(text)
    assert "| stories260k | 3 | - | - | - | 0.25 ± 0.00 at 4.0x | - |" in shown and text.startswith("before\n")
    assert "| stories260k | 5 |" not in shown and "commit abc" in shown
    assert "older version, whose methods each drew their own held-out windows: stories260k best-3 2:4 (seed 2)." in text
    assert tables.with_best(text, tmp_path) == text and tables.with_best("before\n", tmp_path / "results") == "before\n"


@pytest.mark.parametrize("model", ["stories260k", "craftgpt-5m", "smollm2", "smollm2-131k"])
@pytest.mark.parametrize("ppl, seconds, verdict", [(math.e**1.5, 8.0, "met"), (math.e**2.9, 8.0, "MISSED"),
                                                   (math.e**1.5, 12.0, "MISSED")])
def test_a_missed_target_is_said(ppl, seconds, verdict, model):
    rows = [row("sparsegpt", math.e**3), row("best-3", ppl, seconds=seconds)]
    told, unknown = best_table.targets(best_rows.shares([r | {"model": model} for r in rows]))
    assert told.startswith(f"- {model}, 2:4, best-3: ") and told.endswith(f": {verdict}")
    assert f"{model} 2:4 best-5" in unknown and f"{model} 2:4 best-3" not in unknown


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(flags of the tiny model, arguments, folder of the rows that they gave)."""
    folder = tmp_path_factory.mktemp("best")
    flags = tiny.flags(tiny.make(folder))
    flags = [*best.without(best.without(flags, "--method"), "--batch-size"), "--no-dense"]
    flags.remove("--no-progress")
    argv = ["--only", "tiny", "--patterns", "2:4", "--seeds", "0,1", "--ways", "sparsegpt;alps, distil"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best.small_models, "flags_of", lambda shared: {"tiny": flags})
        assert best.main([*argv, "--out", str(folder / "rows")]) == 0
    return flags, argv, folder / "rows"


@pytest.fixture
def rows(measured, tmp_path, monkeypatch):
    """(arguments, folder of the rows) that a test may change."""
    flags, argv, folder = measured
    monkeypatch.setattr(best.small_models, "flags_of", lambda shared: {"tiny": flags})
    return [*argv, "--out", str(tmp_path / "rows")], tiny.copy(folder, tmp_path / "rows")


def ways(folder, **more):
    """The arguments that `missing` looks at."""
    return types.SimpleNamespace(**{"out": folder, "ways": "sparsegpt;alps, distil"} | more)


def test_a_run_from_end_to_end(rows):
    _, folder = rows
    out = json.loads((folder / "tiny.json").read_text())
    assert [(r["seed"], r["way"]) for r in out["rows"]] == [
        (s, w) for s in (0, 1) for w in ("sparsegpt", "alps, distil")]
    assert out["rows"][1]["heal"]["distil"]["steps"] > 0 and str(folder.parent) not in json.dumps(out["rows"])
    assert best_table.main(["--out", str(folder), "--check"]) == 1
    assert best_table.main(["--out", str(folder)]) == best_table.main(["--out", str(folder), "--check"]) == 0
    text = (folder / "best.md").read_text()
    assert "| alps, distil " in text and "; 2 seeds" in text
    assert (folder / "best.svg").read_text().startswith("<?xml")


def test_what_is_measured_is_not_measured_again(rows, monkeypatch):
    argv, _ = rows
    monkeypatch.setattr(best, "cell", lambda *args: pytest.fail("measured again"))
    assert best.main(argv) == 0


def test_rows_in_older_words_are_the_same_rows(rows, monkeypatch):
    """Until version 0.1 healing was called recovery."""
    argv, folder = rows
    text = (folder / "tiny.json").read_text()
    (folder / "tiny.json").write_text(text.replace('"heal": "distil"', '"recover": "distil"').replace(
        '"heal": {', '"recovery": {'))
    assert '"recover": "distil"' in (folder / "tiny.json").read_text()
    monkeypatch.setattr(best, "cell", lambda *args: pytest.fail("measured again"))
    assert best.main(argv) == 0 and len(best_rows.shown(folder)) == 4
    best.store(folder / "tiny.json", json.loads(text)["rows"][0])
    assert "recover" not in (folder / "tiny.json").read_text()


def test_what_an_older_version_has_healed_is_measured_anew(rows, monkeypatch):
    _, folder = rows
    monkeypatch.setitem(best.WAYS, "version", best.WAYS["version"] + 1)
    assert list(best.missing(ways(folder), "tiny", "0", "2:4")) == ["alps, distil"]


def test_a_changed_recipe_is_measured_anew_and_its_old_rows_are_not_shown(rows, monkeypatch):
    argv, folder = rows
    changed = {"method": "alps", "heal": "distil", "distil.steps": 2}
    for module in (best, best_rows):
        monkeypatch.setitem(module.WAYS["ingredients"], "alps, distil", changed)
    assert {r["way"] for r in best_rows.shown(folder)} == {"sparsegpt"}
    assert best.main([*argv, "--seeds", "0"]) == 0
    again = best.read(folder / "tiny.json")
    assert sorted((r["seed"], r["recipe"].get("distil.steps")) for r in again if r["way"] == "alps, distil") == [
        (0, 2), (1, 60)]
    assert "n=1" in best_table.page(best_rows.shown(folder))


def test_without_sparsegpt_there_is_nothing_to_compare_with(rows, capsys):
    _, folder = rows
    kept = [r for r in best.read(folder / "tiny.json") if r["way"] != "sparsegpt"]
    (folder / "tiny.json").write_text(json.dumps({"rows": kept}))
    assert best_table.main(["--out", str(folder)]) == 2
    assert "no sparsegpt to compare with" in capsys.readouterr().err
    assert best_table.main(["--out", str(folder.parent / "none")]) == 2
    assert "nothing measured yet" in capsys.readouterr().err


def test_the_order_of_the_ways():
    order = list(best_rows.recipes())
    assert order[:7] == ["sparsegpt", "alps", *(f"best-{effort}" for effort in range(1, 6))]
    assert set(order) == {*best.WAYS["main"], *best.WAYS["ingredients"]}


def test_alps_stands_beside_its_paper():
    rows = [row("sparsegpt", 40.0), row("alps", 30.0), row("sparsegpt", 60.0, seed=1), row("alps", 50.0, seed=1)]
    (line,) = best_table.against_sparsegpt(best_rows.shares(rows))
    assert "20 % (2:4) less" in line and "9 % (2:4), 8 % (0.6), 29 % (0.7)" in line
    assert best_table.against_sparsegpt(best_rows.shares(rows[:1])) == []
    published = alps.PAPER.perplexity["meta-llama/Llama-2-7b-hf"]
    for pattern, less in best_table.ALPS_PAPER.items():
        assert less == 1 - published["alps"][pattern][0] / published["sparsegpt"][pattern][0]


def test_refiners_stand_beside_what_was_said_of_them():
    rows = [row("wanda", 9.0), row("wanda+swaps", 8.0), row("sparsegpt", 9.0)]
    rows[0]["errors"], rows[1]["errors"] = {"o": 1.0, "q": 2.0}, {"o": 0.5, "q": 0.4}
    (line,) = best_table.refined(rows)
    assert "stories260k 2:4 50 to 80 %" in line and "up to 60 % less" in line


def test_a_preset_is_written_out_in_its_rows():
    assert presets.recipe({"method": "best", "effort": 2}) == {"method": "alps", "dense_target": 0.5}
    assert presets.recipe(best.WAYS["ingredients"]["alps, dense target"]) == {"method": "alps", "dense_target": 0.5}


def test_allocation_is_measured_where_there_is_something_to_allocate():
    args = types.SimpleNamespace(ways="ingredients")
    assert "sparsegpt, owl" in best.ways_of(args, "0.7") and best.ways_of(args, "0.5") == {}
    for flags in best.ways_of(args, "2:4").values():  # none is refused
        checks.check_target(settings.parse([*best.given(flags), "--pattern", "2:4", "--no-dense"])[0])
