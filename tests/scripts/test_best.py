"""scripts/best.py: its yardstick is SparseGPT the published way, its shares are what their definition says."""

import copy
import json
import math
import sys
import types
from pathlib import Path

import families
import pytest
import tiny
import torch

from oneshot import data
from oneshot.pipeline import checks
from oneshot.prune.patterns import parse
from oneshot.report import page

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import _best_table
import best
import tables


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
    found = _best_table.shares(rows)
    assert found["stories260k", "2:4", "best-3"] == [(pytest.approx(0.25), 4.0, pytest.approx(math.e**2.5))]
    assert ("stories260k", "2:4", "alps") not in found  # its seed has no SparseGPT


def test_layer_errors_stand_beside_sparsegpts():
    text = "\n".join(_best_table.error_table([row("sparsegpt", 9.0), row("alps", 8.0), row("best-3", 7.0)], "2:4"))
    assert "| o | 0.5000 | 0.40x |" in text and "best-3" not in text
    assert not any("| o |" in line for line in _best_table.error_table([row("alps", 8.0)], "2:4"))


def test_the_readme_shows_what_best_gains_and_costs(tmp_path):
    rows = [row("sparsegpt", math.e**3, seed) for seed in range(3)]
    rows += [*(row("best-3", math.e**2.5, seed, seconds=8.0) for seed in range(3)), row("best-5", math.e**2)]
    for r in rows:
        r |= {"recipe": best.recipes()[r["way"]], "environment": {
            "device": "cpu", "threads": 1, "torch": "2", "transformers": "5", "commit": "abc", "dirty": False}}
    rows[-1] |= {"recipe": {"method": "another"}}  # from before the preset was changed
    rows.append({**rows[0], "way": "a way of old"})
    rows[3]["version"] = rows[4]["version"] = _best_table.VERSION
    for r in rows:
        best.store(tmp_path / "results" / "best" / "stories260k.json", r)
    text = tables.with_best("before\n", tmp_path)
    assert "| stories260k | 3 | - | - | - | 0.25 ± 0.00 at 4.0x | - |" in text and text.startswith("before\n")
    assert "| stories260k | 5 |" not in text and "commit abc" in text
    assert "older recovery, whose ways each drew their own held-out windows: stories260k best-3 2:4 (seed 2)." in text
    assert tables.with_best(text, tmp_path) == text and tables.with_best("before\n", tmp_path / "results") == "before\n"


@pytest.mark.parametrize("ppl, seconds, verdict", [(math.e**1.5, 8.0, "kept"), (math.e**2.9, 8.0, "MISSED"),
                                                   (math.e**1.5, 12.0, "MISSED")])
def test_a_missed_target_is_said(ppl, seconds, verdict):
    told = _best_table.targets(_best_table.shares([row("sparsegpt", math.e**3), row("best-3", ppl, seconds=seconds)]))
    assert len(told) == 1 and told[0].endswith(verdict)


def test_a_run_from_end_to_end_and_its_continuation(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_pictures", lambda records: [])
    place = tiny.make(tmp_path)
    flags = tiny.flags(place)
    flags = [*best.without(best.without(flags, "--method"), "--batch-size"), "--no-dense"]
    flags.remove("--no-progress")
    monkeypatch.setattr(best.small_models, "flags", lambda shared: {"tiny": flags})
    argv = ["--only", "tiny", "--patterns", "2:4", "--seeds", "0,1", "--ways", "sparsegpt;alps, distil", "--out",
            str(tmp_path / "best")]
    best.main(argv)
    out = json.loads((tmp_path / "best" / "tiny.json").read_text())
    assert [(r["seed"], r["way"]) for r in out["rows"]] == [
        (s, w) for s in (0, 1) for w in ("sparsegpt", "alps, distil")]
    assert out["rows"][1]["recovery"]["distil"]["steps"] > 0 and str(tmp_path) not in json.dumps(out["rows"])
    text = (tmp_path / "best" / "best.md").read_text()
    assert "| alps, distil |" in text and "; 2 seeds" in text
    assert (tmp_path / "best" / "best.svg").read_text().startswith("<?xml")
    with monkeypatch.context() as patch:
        patch.setattr(best, "cell", lambda *args: pytest.fail("measured again"))
        best.main(argv)
    with monkeypatch.context() as patch:  # another recovery: what used it is measured anew, the rest is not
        patch.setattr(_best_table, "VERSION", _best_table.VERSION + 1)
        args = types.SimpleNamespace(out=tmp_path / "best", ways="sparsegpt;alps, distil")
        assert list(best.missing(args, "tiny", "0", "2:4")) == ["alps, distil"]
    with pytest.raises(SystemExit, match="no sparsegpt to compare with"):
        best.main([*argv[:-3], "wanda", "--out", str(tmp_path / "alone"), "--seeds", "0"])
    monkeypatch.setitem(best.INGREDIENTS, "alps, distil", {"method": "alps", "recover": "distil", "distil.steps": 2})
    best.main([*argv, "--table"])  # a changed recipe: its old rows are not shown under the name
    assert "| alps, distil |" not in (tmp_path / "best" / "best.md").read_text()
    best.main([*argv, "--seeds", "0"])  # and are measured anew
    rows = _best_table.read(tmp_path / "best" / "tiny.json")
    assert sorted((r["seed"], r["recipe"].get("distil.steps")) for r in rows if r["way"] == "alps, distil") == [
        (0, 2), (1, 60)]
    assert "n=1" in (tmp_path / "best" / "best.md").read_text()


def test_alps_stands_beside_its_paper():
    rows = [row("sparsegpt", 40.0), row("alps", 30.0), row("sparsegpt", 60.0, seed=1), row("alps", 50.0, seed=1)]
    (line,) = _best_table.against_sparsegpt(_best_table.shares(rows))
    assert "20 % (2:4) less" in line and "9 % (2:4), 8 % (0.6), 29 % (0.7)" in line
    assert _best_table.against_sparsegpt(_best_table.shares(rows[:1])) == []


def test_refiners_stand_beside_what_was_said_of_them():
    rows = [row("wanda", 9.0), row("wanda+swaps", 8.0), row("sparsegpt", 9.0)]
    rows[0]["errors"], rows[1]["errors"] = {"o": 1.0, "q": 2.0}, {"o": 0.5, "q": 0.4}
    (line,) = _best_table.refined(rows)
    assert "stories260k 2:4 50 to 80 %" in line and "up to 60 % less" in line


def test_a_preset_is_written_out_in_its_rows():
    assert best.recipe({"method": "best", "effort": 2}) == {"method": "alps", "dense_target": 0.5}
    assert best.recipe(best.INGREDIENTS["alps, dense target"]) == {"method": "alps", "dense_target": 0.5}


def test_allocation_is_measured_where_there_is_something_to_allocate():
    args = types.SimpleNamespace(ways="ingredients")
    assert "sparsegpt, owl" in best.ways_of(args, "0.7") and best.ways_of(args, "0.5") == {}
    for flags in best.ways_of(args, "2:4").values():  # none is refused
        checks.check_target(best.cli.parse([*best.given(flags), "--pattern", "2:4", "--no-dense"])[0])
