"""The cases of the soak: one disturbance each. `case(draw, world, folder)` gives (what was disturbed, what came of it).

An outcome that begins with WRONG or TRACEBACK is a fault; all others are as they should be.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import soak_mutations as mutations
import sweep
import torch
import workers
from safetensors import SafetensorError
from safetensors.torch import load_file
from soak_world import Ended, World, begin, child, end, interrupted, verified
from transformers import AutoModelForCausalLM

from oneshot.report import compare

FOLDERS = ("wanda", "owl", "gpt2", "packed")  # whose results are spoilt


def result(ended: Ended, good: bool, done: str) -> str:
    """What came of a command that must either give the right weights or refuse in one line."""
    if ended.traceback:
        return f"TRACEBACK {ended.traceback}"
    if ended.code == 0:
        return done if good else "WRONG weights with exit code 0"
    return "refused in one line" if ended.refused else f"WRONG exit code {ended.code}: {ended.lines[-3:]}"


def checked(world: World, name: str, folder: Path, ended: Ended, done: str) -> str:
    """The same, of a command that saves: verified, nothing left over."""
    outcome = result(ended, world.same(name, folder), done)
    if outcome == done:
        left = [f.name for f in (folder, folder.parent / "runs") for f in f.glob(".*")]
        outcome = proved(folder, f"WRONG left over {left}" if left else done)
    return outcome


def proved(folder: Path, done: str) -> str:
    """`done` where verify finds nothing."""
    ended = verified(folder)
    return done if ended.code == 0 else f"WRONG verify says {ended.lines[-3:]}"


# ---------------------------------------------------------------- kills

def kill_run(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """SIGKILL at random times, once to three times, then the same command to its end."""
    name, kills = draw.choice(sorted(world.flags)), draw.randint(1, 3)
    save = folder / "out"
    for _ in range(kills):
        ended = child(world.command(name, save), draw.uniform(0, 1.1) * world.seconds[name])
        if ended.traceback or ended.code not in (0, -9):
            return name, result(ended, False, "")
        if (save / "oneshot.json").exists() and (outcome := proved(save, "")):
            return name, f"{outcome}, though it looks finished after a kill"
    return name, checked(world, name, save, child(world.command(name, save)), "the same bits")


def kill_sweep(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """SIGKILL of a sweep at a random time, then the same sweep to its end: the records that it gives undisturbed."""
    def work(results):
        workers.START = "fork"
        return lambda: sweep.main([str(world.place / "sweep.yaml"), "--results", str(results), "--workers",
                                   str(draw.choice((0, 1)))])
    whole = world.place / "whole" / "sweep"
    if not whole.exists():
        shutil.rmtree(whole, ignore_errors=True)
        world.seconds["sweep"] = child(work(whole)).seconds
    ended = child(work(folder), draw.uniform(0.1, 1) * world.seconds.get("sweep", 3.0))
    if ended.traceback or ended.code not in (0, -9):
        return "sweep", result(ended, False, "")
    time.sleep(0.05)  # its worker ends with it
    ended = child(work(folder))
    told = {f.name: timeless(f) for f in folder.glob("*.json")}
    wanted = {f.name: timeless(f) for f in whole.glob("*.json")}
    if left := [f.name for f in folder.rglob(".*.part")]:
        return "sweep", f"WRONG left over {left}"
    if other := [name for name in {*told, *wanted} if told.get(name) != wanted.get(name)]:
        return "sweep", f"WRONG records {sorted(other)} differ"
    return "sweep", result(ended, True, "the same records")


def timeless(file: Path) -> dict:
    """What a record says, without what differs from run to run."""
    record = json.loads(file.read_text())
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "info")} for row in record["layers"]]
    return {key: record[key] for key in ("run_id", "status", "metrics", "settings", "warnings")} | {"layers": rows}


# ---------------------------------------------------------------- two processes

def pair(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """Two runs with one --save, the second a little later; sometimes the first is killed."""
    names = ("wanda", draw.choice(("wanda", "four")))
    more = draw.choice(((), ("--overwrite",)))
    later, kill = draw.uniform(0, 1.2) * world.seconds["wanda"], draw.random() < 0.3
    save, running = folder / "out", []
    for name, wait in zip(names, (0, later), strict=True):
        time.sleep(wait)
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        running.append((begin(world.command(name, save, *more), log), log, time.monotonic()))
    ends = [end(*one, kill_after=draw.uniform(0, 1) * world.seconds["wanda"] if kill and i == 0 else None)
            for i, one in enumerate(running)]
    what = ("same" if names[0] == names[1] else "different") + " --overwrite" * bool(more) + ", a kill" * kill
    bad = [e for e in ends if e.traceback or e.code not in (0, 2, -9) or (e.code == 2 and not e.refused)]
    if bad:
        return what, result(bad[0], False, "")
    winners = [name for name, e in zip(names, ends, strict=True) if e.code == 0]
    if not winners:
        return what, checked(world, names[0], save, child(world.command(names[0], save, "--overwrite")),
                             "killed, the other refused; then the same bits") if kill else "WRONG both refused"
    return what, proved(save, f"{len(winners)} done, proved" if world.same(winners[-1], save) else "WRONG weights")


# ---------------------------------------------------------------- bit flips

def flip(draw: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def flip_finished(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """One bit of any file of a finished folder: verify finds it, the same command makes it again or refuses."""
    name = draw.choice(FOLDERS)
    save = Path(shutil.copytree(world.whole[name], folder / "out"))
    file = draw.choice(sorted(f for f in save.iterdir() if f.is_file()))
    flip(draw, file)
    return file.name, spoilt(world, name, save)


def spoilt(world: World, name: str, save: Path) -> str:
    """What verify and the same command make of a finished folder that was changed."""
    ended = verified(save)
    if ended.traceback or ended.code not in (1, 2) or (ended.code == 2 and not ended.refused):
        return result(ended, False, "")
    outcome = checked(world, name, save, child(world.command(name, save)), "made again, the same bits")
    return f"found by verify ({ended.code}); {outcome}" if outcome[0].islower() else outcome


def flip_work(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """One bit of any work file of an interrupted run: the same command gives the right weights or refuses."""
    name = draw.choice((*FOLDERS, "healed"))
    save, file = folder / "out", None
    interrupted(world, name, save, draw.choice((0, 1, 2, -1)))
    file = draw.choice(sorted(f for f in (save / ".oneshot").rglob("*") if f.is_file() and f.stat().st_size))
    flip(draw, file)
    kind = "final/" if file.parent.name == "final" else "block" if file.name.startswith("block") else file.name
    return kind, checked(world, name, save, child(world.command(name, save)), "the same bits")


def flip_loaded(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """One bit of a packed folder's weights or manifest: from_pretrained gives the right weights, or raises."""
    save = Path(shutil.copytree(world.whole["packed"], folder / "out"))
    name = draw.choice(("model.safetensors", "model.safetensors", "oneshot.json"))
    flip(draw, save / name)
    return name, loaded(save, world)


def loaded(save: Path, world: World) -> str:
    """What from_pretrained makes of a packed folder."""
    def work():
        try:
            ours = AutoModelForCausalLM.from_pretrained(save).state_dict()
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # what users of the library know
            print(type(error).__name__, file=sys.stderr)
            return 2
        right = AutoModelForCausalLM.from_pretrained(world.whole["packed"]).state_dict()
        return 0 if set(ours) == set(right) and all(torch.equal(ours[k], right[k]) for k in right) else 1
    ended = child(work)
    if ended.traceback:
        return f"TRACEBACK {ended.traceback}"
    return "loads, the same weights" if ended.code == 0 else "WRONG weights, loaded without a word" \
        if ended.code == 1 else f"refused while loading ({ended.lines[-1]})"


# ---------------------------------------------------------------- mutations

def mutated_input(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """A changed file of the input: refused in one line, or pruned into what loads and is proved."""
    name = draw.choice(("config.json", "config.json", "model.safetensors.index.json", "model.safetensors",
                        "generation_config.json", "tokenizer_config.json", "tokenizer.json"))
    source = "sharded" if "index" in name else "llama"
    model = Path(shutil.copytree(world.place / source, folder / "model"))
    kind = (mutations.safetensors_file if name.endswith(".safetensors") else mutations.json_file)(draw, model / name)
    before, save = weights_of(model), folder / "out"
    ended = child(world.command("sharded", save, model=model))
    outcome = result(ended, True, "pruned")
    if outcome == "pruned":
        outcome = proved(save, "pruned and proved")
        if "index" in name and not world.same("sharded", save):
            outcome = "WRONG weights"
        kept = weights_of(save)
        lost = [k for k in before if k in kept and "proj" not in k and not torch.equal(before[k], kept[k])]
        lost += [k for k in before if k not in kept and not any("not in" in line for line in ended.lines)
                 and not recorded_loss(save)]
        outcome = f"WRONG changed or lost {lost[:2]}" if lost else outcome
    return f"input {name}: {kind}", outcome


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's files; {} where they cannot be read."""
    found = {}
    for file in folder.glob("*.safetensors"):
        try:
            found |= load_file(file)
        except Exception:
            return {}
    return found


def recorded_loss(save: Path) -> bool:
    """Whether the record warns of tensors that are not in what was saved."""
    return any("not in what" in w for w in json.loads((save / "oneshot.json").read_text())["record"]["warnings"])


def mutated_manifest(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """A changed manifest: verify finds it, compare reads it or refuses, the same command makes it again or refuses."""
    name = draw.choice(FOLDERS)
    save = Path(shutil.copytree(world.whole[name], folder / "out"))
    kind = mutations.json_file(draw, save / "oneshot.json")
    ended = child(lambda: compare.main([str(save), "--page", str(folder / "c.html")]))
    outcome = result(ended, True, "compared")
    return f"manifest: {kind}", spoilt(world, name, save) if outcome[0].islower() else outcome


def mutated_folder(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """A changed file of a finished folder: found by verify, made again or refused; a packed one also while loading."""
    name = draw.choice(("wanda", "packed"))
    save = Path(shutil.copytree(world.whole[name], folder / "out"))
    file = save / draw.choice(("config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json"))
    kind = (mutations.safetensors_file if file.suffix == ".safetensors" else mutations.json_file)(draw, file)
    if file.read_bytes() == (world.whole[name] / file.name).read_bytes():
        flip(draw, file)
    if name == "packed" and file.suffix == ".safetensors":
        outcome = loaded(save, world)
        if not outcome[0].islower():
            return f"{name} {file.name}: {kind}", outcome
    return f"{name} {file.name}: {kind}", spoilt(world, name, save)


def mutated_work(draw: random.Random, world: World, folder: Path) -> tuple[str, str]:
    """A changed work file: the same command gives the right weights or refuses."""
    name, save = draw.choice(("wanda", "owl")), folder / "out"
    interrupted(world, name, save, draw.choice((0, 1, 2)))
    file = draw.choice(sorted(f for f in (save / ".oneshot").iterdir() if f.suffix in (".json", ".safetensors")))
    kind = (mutations.safetensors_file if file.suffix == ".safetensors" else mutations.json_file)(draw, file)
    what = "block" if file.suffix == ".safetensors" else file.name
    return f"work file {what}: {kind}", checked(world, name, save, child(world.command(name, save)), "the same bits")


CASES = {  # group: {case: how many of ten}
    "kills": {kill_run: 8, kill_sweep: 2},
    "pairs": {pair: 10},
    "flips": {flip_finished: 5, flip_work: 3, flip_loaded: 2},
    "mutations": {mutated_input: 4, mutated_manifest: 2, mutated_folder: 2, mutated_work: 2},
}


def one(group: str, number: int, seed: int, world: World) -> tuple[str, str, str]:
    """(case, what, outcome) of the case of that number: the same for the same seed, but for where a kill falls."""
    draw = random.Random(f"{seed} {group} {number}")
    turns = [case for case, times in CASES[group].items() for _ in range(times)]
    random.Random(0).shuffle(turns)
    case = turns[number % len(turns)]
    with tempfile.TemporaryDirectory(dir=world.place, prefix="case-") as folder:
        try:
            what, outcome = case(draw, world, Path(folder))
        except Exception as error:  # in this process: verify and from_pretrained run here
            what, outcome = "?", f"TRACEBACK {type(error).__name__}: {error} at " + where(error)
    return case.__name__, what, " ".join(outcome.replace(str(world.place), "PLACE").split())[:400]


def where(error: BaseException) -> str:
    """File and line that an exception came from."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
