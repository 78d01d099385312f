"""Quality against real bytes: pruned, rounded, both; rows in results/bench/integers.json.

    python scripts/bench/integers.py --shared ../shared                    # all; continues where it was stopped
    python scripts/bench/integers.py --shared ../shared --only stories260k --seeds 0 --ways "int3 by GPTQ"
    python scripts/bench/integers.py --shared ../shared --only smollm2 --seeds 0 --ways healed --healed build/heal
    python scripts/tables/integers_table.py                                # page and picture from the rows

    bits     of codes, scales and positions for each weight that the dense model has in its blocks' linears
    excess   log ppl - log ppl dense, on held-out text, nats

Every row is for one model, calibration seed and way; integers_ways.yaml names the ways and their flags. With
`--flags "--tasks ..."` (reproduce/local_tasks.py writes some for local files) a row has the tasks as well.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import rotation
import torch
import yaml
from common import asking, chosen, flags_for, quality, replace, rows_of, without
from shrink import flags_of
from tqdm import tqdm

from oneshot import measure, models
from oneshot.checkpoint.bytes import model_bytes
from oneshot.data import choose
from oneshot.pipeline.command import load
from oneshot.pipeline.compress import compress
from oneshot.pipeline.plan import make_plan
from oneshot.quantise import grids, rtn
from oneshot.runtime import environment
from oneshot.runtime.command import exit_code
from oneshot.settings import parse

MODELS = ("stories260k", "craftgpt-5m", "demo")  # and smollm2, of which a run takes minutes
WAYS = yaml.safe_load(Path(__file__).with_name("integers_ways.yaml").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: measure_all(arguments(argv)), interrupted=lambda: "the same command continues")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = asking("integers.py", __doc__, MODELS, 100, "main, more, healed")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--healed", type=Path, default=Path("build/heal"),
                   help="folder of the models that scripts/bench/heal.py --work saved")
    return p.parse_args(argv)


def measure_all(args: argparse.Namespace) -> None:
    """Run what is missing; every row is stored as soon as it is there."""
    models.quiet()
    torch.set_num_threads(args.threads)
    file, ways, every = args.out / "integers.json", chosen(args.ways, WAYS), flags_of(args.shared)
    for name in args.only.split(","):
        if name not in every:
            raise ValueError(f"--only {name}: there are {', '.join(every)}")
        jobs = [(int(seed), way) for seed in args.seeds.split(",") for way in ways
                if not done(rows_of(file), name, int(seed), way, ways[way])]
        flags, dense = flags_for(args, name, every[name]), {}
        for seed, way in tqdm(jobs, desc=name, unit="run"):
            row = {"model": name, "seed": seed, "way": way, "flags": ways[way],
                   **one([*flags, "--seed", str(seed)], dict(ways[way]), args.healed, dense)}
            replace(rows_of(file), row, ("model", "seed", "way"), file)


def done(rows: list[dict], name: str, seed: int, way: str, flags: dict) -> bool:
    """Whether there is a row of these flags."""
    return any((r["model"], r["seed"], r["way"], r["flags"]) == (name, seed, way, flags) for r in rows)


def one(flags: list[str], own: dict, healed: Path, dense: dict) -> dict:
    """What one way costs and takes. dense: {"ppl"} of the dense model, filled on first use.

    Raises ValueError naming `--healed` where it does not hold the model that the way begins with.
    """
    first, begins = own.pop("FIRST", None), own.pop("MODEL", None)
    words = [word for name, value in own.items() for word in [f"--{name}", *([] if value is True else [str(value)])]]
    [cfg] = parse([*flags, *words])
    model, tokenizer = load(cfg)
    texts = choose.evaluation(cfg, model, tokenizer)
    if not dense:
        dense.update(quality(measure.Subject(model, tokenizer, cfg, texts)))
    weights = sum(weight.size for weight in models.all_weights(model))
    if begins:
        if not (healed / begins).is_dir():
            raise ValueError(f"--healed {healed}: holds no {begins}; scripts/bench/heal.py --work {healed} saves it")
        [cfg] = parse([*without(flags, "--model"), "--model", str(healed / begins), *words])
        model, tokenizer = load(cfg)
    calibration = choose.calibration(cfg, model, tokenizer)
    began = time.perf_counter()
    grid = prepared(model, first)
    result = compress(measure.Subject(model, tokenizer, cfg, texts, calibration), make_plan(cfg, model))
    seconds = time.perf_counter() - began
    sizes = model_bytes(model, [row | grid for row in result.layers])
    found = quality(measure.Subject(model, tokenizer, cfg, texts))
    return {**found, "dense_ppl": dense["ppl"], "excess": math.log(found["ppl"] / dense["ppl"]), **sizes,
            "bits": 8 * sizes["stored"] / weights, "seconds": seconds,
            "rounded_to_zero": sum(row.get("rounded_to_zero", 0) for row in result.layers),
            "warnings": result.warnings, "environment": environment.environment(cfg.device)}


def prepared(model: torch.nn.Module, first: str | None) -> dict:
    """Do in place what comes before all else; the entry of a row that says on which grid the weights are then."""
    if first == "rotated":
        rotation.rotate(model)
    elif first:
        rtn.quantise_model(model, grids.parse(first))
        return {"grid": first}
    return {}


if __name__ == "__main__":
    sys.exit(main())
