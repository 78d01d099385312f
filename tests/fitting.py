"""A world for `oneshot fit` without computing: eight blocks whose perplexity and time follow from what is left."""

from pathlib import Path

import families
from transformers import AutoConfig, AutoModelForCausalLM

from oneshot import models
from oneshot.models import groups
from oneshot.pipeline import run
from oneshot.pipeline.fit import command, ending, rounds, steps
from oneshot.pipeline.fit.plans import Candidates
from oneshot.structured import Cut, budget, slices

BLOCKS = 8


class World:
    """Stands in for the runs, the models on disk and the measured losses.

    ppl: of the share of parameters that is left. looks: the Candidates of each round, by the number of blocks left.
    """

    rounded = 21.0  # perplexity of the dense model in int8; int4 has twice that

    def __init__(self, monkeypatch, ppl, time=lambda share: share, windows=None):
        config = AutoConfig.for_model("mistral", **families.COMMON | {"num_hidden_layers": BLOCKS,
                                                                      "sliding_window": None})
        self.models = {"model": AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)}
        self.ppl, self.time, self.windows = ppl, time, windows
        self.runs, self.configs, self.timed, self.asked, self.limits = [], [], [], [], []
        self.whole = self.parameters("model")
        monkeypatch.setattr(run, "run", self.run)
        monkeypatch.setattr(command.checks, "check", lambda configs: None)
        monkeypatch.setattr(models, "load", lambda name, **_: (self.models[str(name)], None))
        monkeypatch.setattr(rounds.Fit, "looks", property(lambda own: self))
        monkeypatch.setattr(steps, "time_share", self.time_share)
        monkeypatch.setattr(rounds.Fit, "table", property(lambda own: self.table if "latency" in own.asked.targets
                                                          else None))
        monkeypatch.setattr(ending, "acceptance", lambda fit: {})
        monkeypatch.setattr(ending.device_table, "warnings", lambda table: [])
        monkeypatch.setattr(ending, "accepted_lines", lambda fit, accepted: [])
        monkeypatch.setattr(ending, "draw", lambda fit, plain: None)
        monkeypatch.setattr(ending, "record_of", lambda state: self.records[state.result])
        self.records = {}
        self.table = {"units": {}, "family": "mistral", "blocks": BLOCKS,
                      "parts": {kind: {"rest": 0.0, "block": 1.0, "saved": {}} for kind in ("decode1", "prefill",
                                                                                            "decode8")}}

    def parameters(self, name):
        return sum(p.numel() for p in models.blocks(self.models[name])[1].parameters())

    def share(self, name):
        return self.parameters(name) / self.whole

    def at(self, model, costs, start, limits, allow):
        """One or two blocks may go, or neurons, or all may be rounded."""
        self.asked.append(allow)
        self.limits.append(limits)
        n = len(models.blocks(model)[1])
        found = Candidates()
        if "shrink" in allow:
            found.drops += [(tuple(range(d)), 0.1 * d) for d in range(1, min(n, 5))]
            kept = budget.neurons_for(model, budget.Budget(0.9 * costs.sizes.left(Cut()), costs.sizes.left), ())
            found.widths += [(kept.kept, 5.0)] if kept else []
        for grid, loss in (("int8", 0.001), ("int4", 0.5)):
            if grid in allow and set(limits) & {"bytes"}:
                found.grids[grid] = dict.fromkeys(range(n), loss / n)
        return found

    def whole(self, model, plan):
        """What a cut loses as a whole: what its parts lose."""
        return 0.1 * len(plan.drop) + 5.0 * bool(plan.widths)

    def time_share(self, cfg, folder):
        self.timed.append(folder)
        return self.time(self.share(folder))

    def run(self, cfg):
        if cfg.save:
            self.models[cfg.save] = self.smaller(cfg)
        name = cfg.save or cfg.model
        share, factor = self.share(name), self.bytes_of(cfg)
        ppl = self.ppl(share)
        if "plain" in Path(name).name:
            ppl = self.rounded * (2 if cfg.quantise == "int4:64" else 1)
        self.records[name] = {
            "metrics": {"text/ppl": ppl, "task/acc": 0.5 * share}, "metric_info": self.windows(share) if self.windows
            else {}, "model": {"in_blocks": self.parameters(name), "blocks": len(models.blocks(self.models[name])[1])},
            "bytes": {"stored": share * factor, "dense": 1.0}}
        self.configs.append(cfg)
        if cfg.save and "plain" not in name:
            self.runs.append((Path(cfg.model).name, Path(cfg.save).name, round(share, 3)))
        return self.records[name]

    def bytes_of(self, cfg):
        """What rounding leaves of the bytes, by the blocks' grids."""
        number = len(models.blocks(self.models[cfg.save or cfg.model])[1])
        own = [cfg.grids.of(f"model.layers.{b}.mlp.up_proj") for b in range(number)]
        return sum({None: 1.0, "int8:row": 0.25, "int4:64": 0.125}[grid and str(grid)] for grid in own) / number

    def smaller(self, cfg):
        model = self.models[cfg.model]
        if not cfg.shrinks:
            return model
        found = Cut(cfg.dropped_blocks, ((groups.HEADS, cfg.kv_groups),) if cfg.kv_groups else ())
        if cfg.shrink:
            sizes = budget.Sizes.of(model)
            found = budget.neurons_for(model, budget.Budget(cfg.shrink * sizes.left(Cut()), sizes.left), found.dropped,
                                       found.kept)
        return slices.first_units(model, found)

    def go(self, tmp_path, *words):
        """Exit code of the command."""
        return command.main(["--model", "model", "--save", str(tmp_path / "out"), *words, "--no-progress", "--device",
                             "cpu"])
