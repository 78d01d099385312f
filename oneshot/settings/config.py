"""RunConfig: one run's settings. Its fields are the command line's flags (cli.py) and the record's settings."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..prune import patterns

DTYPES = ("auto", "float32", "bfloat16", "float16")


PARTS = ("solver", "recovery", "allocation")  # fields that hold other modules' Configs


def flag(default, help, **extra):
    return field(default=default, metadata={"help": help, **extra})


def listed(text):
    """The parts of a comma list; none for "none"."""
    parts = [part.strip() for part in text.split(",")]
    return [] if parts == ["none"] else [part for part in parts if part]


@dataclass(frozen=True)
class RunConfig:
    """One model, one method, one pattern. None means: decided when the model is known."""

    model: str = flag("demo", "local folder, hub name, or demo (the small model shipped with oneshot)", group="what")
    method: str = flag("magnitude,wanda,sparsegpt", "solver, or chain as in wanda+refit, or best; several by commas",
                       group="what", many=True)
    effort: int = flag(3, "what --method best may cost, 1 to 5 (what it needs); see --method best below",
                       group="what", output=True)
    pattern: str = flag("0.5,2:4", "0.5 = half of the weights are zero; 2:4 = 2 of 4 are KEPT; several by commas",
                        group="what", many=True)
    group: str | None = flag(None, "where an unstructured pattern is counted: matrix, row, or a number of columns "
                                   "(default: the method's own)", group="what")
    true_sequential: bool = flag(False, "q,k,v, then o, then gate,up, then down, each on what is pruned before it",
                                 group="what")
    allocate: str = flag("uniform", "how the zeros are spread over the linears: see --allocate below", group="what")
    dense_target: float = flag(0.0, "0 to 1: how far each linear aims at its output in the dense model instead of at "
                                    "the dense linear's output on the pruned model's inputs (try 0.5)",
                               group="what")
    recover: str = flag("none", "repair by training the kept weights on the calibration windows: block, distil, or "
                                "block,distil", group="what")
    stop_on_collapse: bool = flag(False, "end with an error at the first block whose output falls apart (its error, "
                                         "norm or effective dimensions out of bounds); else that is a warning",
                                  group="what")
    shared_inputs: bool = flag(False, "solve all methods and patterns of the command from the DENSE model's inputs: "
                                      "one pass over the data (one more to allocate); every Gram matrix is "
                                      "factored once for all (alps: once for each of its penalties); blocks that fall "
                                      "apart are not looked for, and a killed run begins anew", group="what")

    calibration: str = flag("builtin", "builtin, self (sampled from the model), wikitext2, c4, ptb, a hub data set, or "
                                       "a .txt .jsonl .json .parquet .csv file", group="data")
    nsamples: int = flag(128, "calibration windows", group="data")
    seqlen: int | None = flag(None, "tokens in a window (default: min(2048, the model's positions))", group="data")
    seed: int = flag(0, "which windows; with --recover also which of them are held out, the order of training and the "
                        "positions distil looks at; nothing else is random", group="data")
    documents: str = flag("join", "join: windows run across documents, the papers' way; separate: each document is its "
                                  "own window, padded and masked", group="data", choices=("join", "separate"))
    per_line: bool = flag(False, "each line of a .txt file is a document", group="data")
    column: str | None = flag(None, "the column that holds the text", group="data")
    data_config: str | None = flag(None, "configuration of a hub data set", group="data")
    split: str | None = flag(None, "split of a hub data set", group="data")
    revision: str | None = flag(None, "revision of a hub data set", group="data")

    evaluate: str = flag("builtin", "texts to measure perplexity on, as for --calibration, separated by commas; "
                                    "NAME=FILE gives one a name; none: skip", group="evaluation")
    tasks: str = flag("none", "lm-eval tasks to measure, separated by commas; zeroshot7: the papers' seven",
                      group="evaluation")
    task_path: str | None = flag(None, "folder of task YAMLs of your own, instead of lm-eval's", group="evaluation")
    task_limit: int | None = flag(None, "measure on the first so many documents of each task", group="evaluation")
    prompts: str | None = flag(None, "file with a line {\"prompt\": ..., \"expected\": ...} each, if you like with "
                                     "\"choices\": [...]: how often the model says it", group="evaluation")
    robustness: bool = flag(False, "measure perplexity with typos, other case and other white space as well",
                            group="evaluation")
    divergence: bool = flag(False, "compare each token's prediction with the dense model's: KL, top-1, flips",
                            group="evaluation")
    damage: bool = flag(False, "find the tokens and passages that lost most against the dense model; the record quotes "
                               "them", group="evaluation")
    eval_seqlen: int | None = flag(None, "window of the evaluation (default: --seqlen)", group="evaluation")
    eval_windows: int | None = flag(None, "measure on at most so many windows of each text", group="evaluation")
    eval_batch_size: int | None = flag(None, "windows at a time (default: --batch-size)", group="evaluation")

    dtype: str = flag("auto", "dtype the weights are kept and saved in; on a CPU all computing is float32",
                      group="machine", choices=DTYPES)
    device: str = flag("cpu", "where blocks are computed, one at a time: cpu, cuda, cuda:1", group="machine")
    batch_size: int = flag(8, "windows at a time", group="machine")
    activations: str | None = flag(None, "where activations wait between blocks (default: on the device)",
                                   group="machine")
    activation_dtype: str | None = flag(None, "as what they wait (default: as computed)", group="machine",
                                        choices=DTYPES[1:])
    gram_budget: float = flag(4.0, "GiB of Gram matrices gathered at once; what does not fit takes further passes",
                              group="machine")
    tf32: bool = flag(False, "allow TF32 products on the GPU: faster, 10 bits of mantissa", group="machine")
    layer_errors: bool = flag(True, "measure every linear's output error, on a sample of 256 tokens", group="machine")

    model_revision: str | None = flag(None, "revision of a hub model", group="machine")
    cache_dir: str | None = flag(None, "Hugging Face cache folder", group="machine", output=True)
    trust_remote_code: bool = flag(False, "run code that the model's repository brings; off for a reason",
                                   group="machine")

    save: str | None = flag(None, "write the pruned model here, block by block: the same command continues a killed "
                            "run; one folder each below it for several methods or patterns",
                            group="output", output=True)
    format: str = flag("dense", "dense: zeros among the weights, loads everywhere; packed: 2:4 linears at 0.5625 "
                                "of their bytes, loads after `import oneshot`",
                       group="output", choices=("dense", "packed"))
    overwrite: bool = flag(False, "replace another run's result in --save", group="output", output=True)
    results: str = flag("runs", "folder for the run's record (JSON) and page (HTML)", group="output", output=True)
    dense: bool = flag(True, "measure the dense model as well", group="output", output=True)
    sensitivity: str = flag("none", "first prune one linear, or one kind of linear, at a time and measure the loss: "
                                    "what must not be touched", group="evaluation",
                            choices=("none", "linear", "kind"))
    quantised: bool = flag(False, "measure plain int8, int4 and the integers of equal bytes as well, nothing pruned",
                           group="output", output=True)
    progress: bool = flag(True, "show progress bars", group="output", output=True)

    preset: str | None = None  # the name under which the settings were asked for: best-3
    solver: dict = field(default_factory=dict)  # {part of the method's chain: its Config}
    recovery: dict = field(default_factory=dict)  # {way to recover: its Config}
    allocation: dict = field(default_factory=dict)  # {way to allocate: its Config}

    def __post_init__(self):
        for name in ("nsamples", "batch_size", "seqlen", "eval_seqlen", "eval_windows", "eval_batch_size",
                     "task_limit"):
            value = getattr(self, name)
            if value is not None and value < (2 if "seqlen" in name else 1):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {2 if 'seqlen' in name else 1}")
        if not 0 < self.gram_budget < math.inf:
            raise ValueError(f"--gram-budget {self.gram_budget:g}: must be a positive number of GiB")
        if not 0 <= self.dense_target <= 1:
            raise ValueError(f"--dense-target {self.dense_target:g}: give a share from 0 to 1")
        for name in ("model", "save", "results"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name}: is empty")
        patterns.parse_group(self.group)
        if self.method != "rtn":
            patterns.parse(self.pattern, self.group)

    @property
    def prunes(self):
        """Whether anything is pruned; else the row is there for comparison: the dense model, or a quantised one."""
        return self.method not in ("dense", "rtn")

    @property
    def evaluations(self):
        """The texts to measure perplexity on."""
        return listed(self.evaluate)

    @property
    def recoveries(self):
        """The ways to repair what was pruned, in their order."""
        return listed(self.recover)

    @property
    def task_names(self):
        """The lm-eval tasks to measure."""
        return listed(self.tasks)

    def settings(self):
        """All that bears on the numbers, as plain values: for the record and the run_id."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)
                 if f.name not in PARTS and not f.metadata.get("output")}
        plain |= {part: {name: dataclasses.asdict(cfg) for name, cfg in getattr(self, part).items()} for part in PARTS}
        if not self.prunes:  # calibration and pruning do not touch it
            keep = {"model", "method", "pattern", "evaluate", "dtype", "device", "model_revision",
                    "documents", "per_line", "column", "data_config", "split", "revision", "prompts", "robustness"}
            keep |= {"divergence", "damage"} if self.method != "dense" else set()
            plain = {k: v for k, v in plain.items() if k in keep or k.startswith(("eval_", "task"))}
        return plain

    def run_id(self, *fingerprints):
        """Readable name and a hash of all settings and of what they were applied to (model, windows)."""
        whole = json.dumps([self.settings(), fingerprints], sort_keys=True, default=str)
        model = Path(self.model.rstrip("/")).name or "model"
        parts = [model, self.method] + ([self.pattern.replace(":", "of")] if self.method != "dense" else [])
        return "-".join(parts) + "-" + hashlib.sha256(whole.encode()).hexdigest()[:8]
