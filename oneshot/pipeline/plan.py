"""Plan: which linear gets which pattern, and the pruning job made from that."""

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import replace

from oneshot_kernels import columns
from torch import nn

from .. import heal, models, quantise
from ..checkpoint import packed
from ..data import Tokens
from ..heal.train import held_out_windows, windows_per_step
from ..prune import allocate, patterns, solvers
from ..prune import job as jobs
from ..prune.job import Chain, Job
from ..prune.patterns import Dense, Pattern
from ..prune.shared_inputs import dense_pass
from ..prune.solvers import sparsegpt
from ..runtime import environment, products
from ..runtime.inputs import one_line, parse_json, read_text
from ..settings import RunConfig

Plan = dict[str, Pattern]


def pruning_chain(cfg: RunConfig) -> Chain:
    """The solver chain: [(solver or refiner, its Config), ...]."""
    return [(module, cfg.solver[solvers.short(module)]) for module in solvers.chain(cfg.method)]


def pattern_of(cfg: RunConfig) -> Pattern:
    """The Pattern that `--pattern` asks for, with its comparison group set."""
    return patterns.parse(cfg.pattern, cfg.group).with_default_group(pruning_chain(cfg)[0][1].group)


def needs_data(cfg: RunConfig) -> bool:
    """Whether the run needs calibration data."""
    if not cfg.prunes:
        return False
    looks = cfg.layer_errors or cfg.window_heals or cfg.dense_target or cfg.shrinks
    looks = looks or (cfg.quantise is not None and (cfg.scale_columns or quantise.module(cfg.quantiser).needs))
    needs = (allocate.module(cfg.allocate).needs, *(module.needs for module, _ in pruning_chain(cfg)))
    return bool(looks or any(needs))


def make_plan(cfg: RunConfig, model: nn.Module) -> Plan:
    """{full linear name: Pattern} before allocation; {} if nothing is pruned.

    The pattern is the same everywhere, except for `--keep-dense`, and with `--allocate mix` for linears whose shape
    does not allow it, which are dense here.

    Raises ValueError naming the flag that cannot be satisfied.
    """
    if not cfg.prunes:
        return {}
    if packed.linears(model):
        raise ValueError(f"--model {cfg.model}: is pruned and packed already; give the dense model, or --method dense "
                         "to measure this one")
    kept = kept_dense(cfg.keep_dense, [weight.name for weight in models.all_weights(model)])
    method, elsewhere = allocate.module(cfg.allocate), None
    if hasattr(method, "check"):
        method.check(blocks_of(model, kept), pattern_of(cfg), cfg.allocation[cfg.allocate])
        elsewhere = Dense()
    plan = jobs.make_plan(model, pattern_of(cfg), pruning_chain(cfg), elsewhere, kept)
    if cfg.method == solvers.KEEP:
        check_kept(plan, model)
    return plan


def check_kept(plan: Plan, model: nn.Module) -> None:
    """Raise ValueError naming `--method keep` and the first linear that does not have its pattern."""
    for weight in models.all_weights(model):
        if not plan[weight.name].holds(weight.get()):
            pattern = plan[weight.name]
            asked = f"--pattern {pattern}" + (f" within --group {pattern.group}" if pattern.group else "")
            raise ValueError(f"--method keep: {weight.name} does not have {asked}; give what the model has")


def kept_dense(spec: str | None, names: Sequence[str]) -> set[str]:
    """The linears among `names` that stay dense. spec: the value of `--keep-dense`.

    Raises ValueError naming `--keep-dense` and an entry that matches nothing, or if nothing is left to prune.
    """
    kept = set()
    for entry in filter(None, (part.strip() for part in (spec or "").split(","))):
        file, colon, count = entry.rpartition(":")
        if colon and file.endswith(".json") and count.isdecimal():
            wanted = most_sensitive(file, int(count))
            found = {name for name in names for unit in wanted if f".{unit}." in f".{name}."}
        else:
            found = set(fnmatch.filter(names, entry))
        if not found:
            raise ValueError(f"--keep-dense {entry}: matches none of the model's {len(names)} linears, such as "
                             f"{names[0]}")
        kept |= found
    if len(kept) == len(names):
        raise ValueError(f"--keep-dense {spec}: keeps all linears dense, nothing is left to prune")
    return kept


def most_sensitive(file: str, count: int) -> list[str]:
    """The `count` most harmful units in the record of a run with `--sensitivity`: linears, or kinds of linear.

    Raises ValueError naming `--keep-dense` if the file holds no such measurement.
    """
    if count < 1:
        raise ValueError(f"--keep-dense {file}:{count}: the number of linears must be at least 1")
    return [row["name"] for row in sensitivities(file)["sensitivity"][:count]]


def sensitivities(file: str) -> dict:
    """The record in a file, if it holds what `--sensitivity` measured. Raises ValueError naming `--keep-dense`."""
    try:
        record = parse_json(read_text(file))
        if all(isinstance(row["name"], str) for row in record["sensitivity"]) and record["model"]["fingerprint"]:
            return record
        why = "entries without a name"
    except (ValueError, LookupError, TypeError) as error:
        why = f"no {error} in it" if isinstance(error, LookupError) else one_line(error)
    raise ValueError(f"--keep-dense {file}: holds no sensitivities ({why}); give a record made with --sensitivity")


def kept_mark(cfg: RunConfig, model: nn.Module, weights: str) -> str:
    """What `--keep-dense` means for this model, as part of a run's identity: the names of what stays dense.

    Raises ValueError if a record that it names was measured on another model. weights: this one's fingerprint.
    """
    for entry in (part.strip() for part in cfg.keep_dense.split(",")):
        file = entry.rpartition(":")[0]
        if file.endswith(".json") and sensitivities(file)["model"]["fingerprint"] != weights:
            raise ValueError(f"--keep-dense {entry}: was measured on another model; use --sensitivity with this one")
    return ",".join(sorted(kept_dense(cfg.keep_dense, [weight.name for weight in models.all_weights(model)])))


def blocks_of(model: nn.Module, kept: Collection[str] = frozenset()) -> list[dict[str, allocate.Linear]]:
    """[{linear: its shape and itemsize}], one dict per block, for allocation; without `kept`, which stay dense."""
    return [{w.name: allocate.Linear(*w.shape, w.stored.itemsize) for w in block.weights if w.name not in kept}
            for block in models.walk(model)]


def allocated(configs: Sequence[RunConfig], model: nn.Module, plans: Sequence[Plan],
              calibration: Tokens | None) -> list[Plan]:
    """The runs' plans with their zeros distributed as `--allocate` says; one dense calibration pass serves all runs."""
    cfg = configs[0]  # the runs of a command differ only in method and pattern
    method, own = allocate.module(cfg.allocate), cfg.allocation.get(cfg.allocate)
    if not plans[0] or cfg.allocate == "uniform":
        return list(plans)
    kept = kept_dense(cfg.keep_dense, list(plans[0]))
    measured = {pattern_of(c): {} for c in configs}
    if method.needs:
        for _, weights, statistics in dense_pass(model, calibration.ids, calibration.mask, method.needs, cfg):
            seen = {w.name: (w.get, statistics[w.name]) for w in weights
                    if w.name in statistics and w.name not in kept}
            for pattern, values in measured.items():
                values |= method.measure(seen, pattern, own)
    blocks, dense = blocks_of(model, kept), dict.fromkeys(kept, Dense())
    return [method.plan(measured[pattern_of(c)], blocks, pattern_of(c), own) | dense for c in configs]


def pruning_job(cfg: RunConfig, plan: Plan, calibration: Tokens | None = None) -> Job:
    """The pruning job for a plan with these settings. calibration: determines the windows held out from healing."""
    healers = tuple(heal.module(name).Heal(cfg.healing[name], cfg.seed, cfg.progress) for name in cfg.window_heals)
    if not healers or not calibration:
        return Job(plan, pruning_chain(cfg), cfg, healers)
    n, seqlen = calibration.ids.shape
    options = replace(cfg, batch_size=windows_per_step(cfg.batch_size, seqlen))
    return Job(plan, pruning_chain(cfg), options, healers, held_out_windows(n, seqlen, cfg.seed))


def keep_dense_warning(cfg: RunConfig, model: nn.Module) -> list[str]:
    """A warning that says what `--keep-dense` leaves dense, with its share of the prunable weights; [] without it."""
    if not (cfg.prunes and cfg.keep_dense):
        return []
    sizes = {weight.name: weight.size for weight in models.all_weights(model)}
    kept = kept_dense(cfg.keep_dense, list(sizes))
    share = sum(sizes[name] for name in kept) / sum(sizes.values())
    return [f"--keep-dense: {len(kept)} of {len(sizes)} linears stay dense, {share:.1%} of the prunable weights"]


def circumstances(cfg: RunConfig, calibration: Tokens | None) -> dict:
    """What the bits of a block depend on beside the run's settings: a run that resumes with others says so."""
    found = environment.environment(cfg.device)
    same = {key: found[key] for key in ("threads", "device", "torch", "transformers", "oneshot", "commit")}
    compiled = cfg.quantise is not None or any(module is sparsegpt for module, _ in pruning_chain(cfg))
    return same | {"calibration": calibration.sha256[:12] if calibration else None, "onednn": products.by_onednn()} | (
        {"column_loop": columns.kind(cfg.device)} if compiled else {}) | (
        {"bfloat16": environment.fast_bfloat16(cfg.device)} if cfg.heals or cfg.compute == "stored" else {})
