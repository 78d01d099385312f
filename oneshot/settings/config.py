"""RunConfig: the settings of one run, combined from the flags that the stages declare; also the record's `settings`."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import heal, measure, quantise
from ..data.choose import DataOptions
from ..heal.options import HealOptions
from ..models.loading import LoadOptions
from ..prune import patterns
from ..prune.options import Options
from ..quantise import mixed
from ..runtime import environment
from ..runtime.flag import flag, listed
from ..structured.options import ShrinkOptions

PARTS = {"solver": "solver", "healing": "recovery", "allocation": "allocation",
         "rounding": "rounding"}  # {dict of Configs: its former name}
ADDED = {"rounding"}  # of which those are left out of record and identity where they are empty


@dataclass(frozen=True)
class PruneOptions:
    """Flags that say what is done to the model."""

    method: str = flag("magnitude,wanda,sparsegpt", "a solver, a chain such as wanda+refit, or best; several separated "
                                                    "by commas", section="what", bears_on="loading", shown=False,
                       python=False)
    effort: int = flag(3, "cost of --method best, 1 to 5; see --method best below", section="what", bears_on="output",
                       python=True)
    pattern: str = flag("0.5,2:4", "0.5: half of the weights are zero; 2:4: 2 of 4 are KEPT; several separated "
                                   "by commas", section="what", bears_on="loading", shown=False, python=False)
    group: str | None = flag(None, "comparison group of an unstructured pattern: matrix, row, or a number of columns "
                                   "(default: the method's)", section="what", preset=True)
    allocate: str = flag("uniform", "how the zeros are distributed over the linear layers; see --allocate below",
                         section="what", preset=True)
    keep_dense: str | None = flag(None, "linear layers that stay dense, separated by commas: globs of full names such "
                                        "as 'model.layers.0.*,*.down_proj', or RECORD.json:N, the N most harmful to "
                                        "prune in the record of a run with --sensitivity", section="what", preset=True,
                                  added=True)
    heal: str = flag("none", "train the kept weights: block, distil, on the calibration windows; full, lora (a "
                             "low-rank change), on --heal-data; several by commas, in this order",
                     section="what", preset=True, was="recover")
    quantise: str | None = flag(None, "round the weights that are kept to integers, after all else: int8, int4, int3 "
                                      "(a float16 scale for each 128 columns of a row), int4:64 or int4:row for other "
                                      "groups, or GGUF's q8_0, q4_0; behind it other grids, or none, by globs of "
                                      "full names, the last that matches counts: 'int4:64,model.layers.0.*=int8:row,"
                                      "*.down_proj=none'; the output head only by its full name: 'int8:row,"
                                      "lm_head=int8:row'; with --method dense the model is only rounded, with "
                                      "--method keep its zeros stay", section="what", preset=True, added=True)
    quantiser: str = flag("gptq", "how --quantise rounds: gptq, rtn (to nearest), or joint (--method sparsegpt chooses "
                                  "the mask and rounds in one pass)", section="what", preset=True, added=True)
    scale_columns: bool = flag(False, "before --quantise rounds, make columns of large inputs larger, and what "
                                      "computes these inputs smaller (AWQ), as far as that lowers the error; but for "
                                      "rounding to its dtype the model computes the same", section="what", preset=True,
                               added=True)
    shared_inputs: bool = flag(False, "solve all methods and patterns of the command on the DENSE model's inputs, in "
                                      "one pass over the data (two with --allocate); Gram matrices are factored once "
                                      "for all (alps: once per penalty); collapsed blocks are not detected, and an "
                                      "interrupted run starts over", section="what", python=False, preset=True)

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        patterns.parse_group(self.group)
        if self.method != "rtn":
            patterns.parse(self.pattern, self.group)
        quantise.module(self.quantiser)
        if self.quantise is not None:
            try:
                mixed.parse(self.quantise)
            except ValueError as error:
                raise ValueError(f"--quantise {error}") from None


@dataclass(frozen=True)
class OutputOptions:
    """Flags that say where results go and which rows are shown beside the pruned ones."""

    save: str | None = flag(None, "folder to save the pruned model in, block by block, so that the same command "
                                  "resumes an interrupted run; with several methods or patterns, a subfolder for each",
                            section="output", bears_on="output")
    format: str = flag("dense", "dense: zeros are stored, loads everywhere; packed: 2:4 layers take 0.5625 of their "
                                "dense bytes (--quantise int8:row or int4:64: less), loads after `import oneshot`; "
                                "compressed-tensors: what --quantise rounded, for transformers and vLLM; "
                                "gguf, or gguf:f16 for another type: model.gguf beside the weights, for llama.cpp",
                       section="output", shown=False, python=False, choices=(
                           "dense", "packed", "compressed-tensors", "gguf", "gguf:f32", "gguf:f16", "gguf:bf16",
                           "gguf:q8_0", "gguf:q4_0"))
    overwrite: bool = flag(False, "replace another run's result in --save", section="output", bears_on="output")
    results: str = flag("runs", "folder for the run's record (JSON) and page (HTML)", section="output",
                        bears_on="output")
    dense: bool = flag(True, "measure the dense model as well", section="output", bears_on="output")
    quantised: bool = flag(False, "also measure the unpruned model rounded to int8, int4 and to integers of as many "
                                  "bytes as the patterns", section="output", bears_on="output")

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        for name in ("save", "results"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name}: is empty")


MEASURED = tuple(measure.module(name).Config for name in measure.names())
STAGES = (OutputOptions, Options, *reversed(MEASURED), DataOptions, HealOptions, ShrinkOptions, PruneOptions,
          LoadOptions)  # the last one's first


@dataclass(frozen=True)
class RunConfig(*STAGES):
    """One model, one method, one pattern. A value of None is decided when the model is known.

    preset: the preset that the settings come from, such as "best-3". solver: {part of the method's chain: its Config}.
    healing: {healing method: its Config}. allocation: {allocation method: its Config}. rounding: {quantiser: its
    Config}, empty where nothing is rounded.
    """

    preset: str | None = None
    solver: dict = field(default_factory=dict)
    healing: dict = field(default_factory=dict)
    allocation: dict = field(default_factory=dict)
    rounding: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", environment.resolve_device(self.device))
        self.check()

    def check(self) -> None:
        """Raise ValueError naming the first flag whose value cannot be used."""
        for stage in STAGES:
            if hasattr(stage, "check"):
                stage.check(self)

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned; if not, the run is for comparison: the dense model, or a rounded one."""
        return self.method not in ("dense", "rtn")

    @property
    def row(self) -> str:
        """The kind of this run and of its row in tables: "pruned", "rounded" or "dense"."""
        return "pruned" if self.prunes else "rounded" if self.method == "rtn" else "dense"

    @property
    def grids(self) -> mixed.Grids:
        """What `--quantise` rounds each linear to; without it none."""
        return mixed.Grids(None) if self.quantise is None else mixed.parse(self.quantise)

    @property
    def heals(self) -> list[str]:
        """The healing methods, in order."""
        return listed(self.heal)

    @property
    def window_heals(self) -> list[str]:
        """Those of the healing methods that work on the calibration windows."""
        return [name for name in self.heals if not heal.trains_on_text(name)]

    @property
    def text_heals(self) -> list[str]:
        """Those of the healing methods that train on `--heal-data`."""
        return [name for name in self.heals if heal.trains_on_text(name)]

    def settings(self) -> dict[str, Any]:
        """Everything that affects the numbers, as plain values, for the record and the run_id."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata and self._bears(f)}
        if self.prunes:
            plain["preset"] = self.preset
            plain |= {part: {name: dataclasses.asdict(cfg) for name, cfg in getattr(self, part).items()}
                      for part in PARTS if part not in ADDED or getattr(self, part)}
        return plain

    def _bears(self, f: dataclasses.Field) -> bool:
        """Whether a flag affects the numbers of this run."""
        at_default = f.metadata["added"] and getattr(self, f.name) == f.default
        return f.metadata["bears_on"] != "output" and self.row in f.metadata["rows"] and not at_default

    def run_id(self, *fingerprints: str | None) -> str:
        """A readable name, of a file on any system, with a hash of all settings and of the `fingerprints` of model and
        windows."""
        before = {f.name: f.metadata["was"] for f in fields(self) if f.metadata and f.metadata["was"]} | PARTS
        settings = {before.get(name, name): value for name, value in self.settings().items()}
        whole = json.dumps([settings, fingerprints], sort_keys=True, default=str)
        model = re.sub(r'[<>:"|?*\\]', "_", Path(self.model.rstrip("/")).name) or "model"
        parts = [model, self.method] + ([self.pattern.replace(":", "of")] if self.method != "dense" else [])
        return "-".join(parts) + "-" + hashlib.sha256(whole.encode()).hexdigest()[:8]
