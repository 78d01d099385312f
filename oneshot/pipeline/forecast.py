"""Forecast: the memory, disk and work of a run, by part, from the model's shapes and the run's settings alone.

Nothing is measured here and nothing is read: a Shape and a Task go in, bytes and numbers of operations come out.

    stored      as the weights are kept; computing: as a block is while it is resident (float32 on a CPU)
    phase       a stretch of a run with a peak of its own; parts that are there at the same time stand in one
    work        how much there is to do of each KIND; machine.py says how fast a machine does it
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..calibrate.statistics import SAMPLE
from ..measure.losses import GROUP_BYTES, SLICE
from ..runtime import environment
from .sizes import Layer, Shape

KINDS = ("start", "product", "solve", "choice", "touched", "hashed", "read", "written")
# the program's start; operations of matrix products, and of solvers with a Gram matrix; weights that a mask is chosen
# for without one; bytes
SOLVERS = {  # float32 at the peak: (copies of the Gram matrix, of the weight, of at most so many columns of the weight)
    "magnitude": (0, 4, 0), "wanda": (0, 4, 0), "ria": (0, 6, 0), "sparsegpt": (1, 2.3, 1024), "refit": (1, 10, 0),
    "admm": (1, 9, 0), "alps": (27, 11, 0)}  # tests/pipeline/test_forecast.py counts them
DEAREST = SOLVERS["alps"]  # for what is not in the table
LOOP = 128  # columns of SparseGPT's mask block
LEAST = 2**26  # bytes: a smaller budget of Gram matrices gains nothing


class Part(NamedTuple):
    """Bytes of one kind of thing. on_gpu: whether they are in the GPU's memory, where the run has one."""

    name: str
    bytes: float
    on_gpu: bool = False


@dataclass(frozen=True)
class Task:
    """What a run does, as far as memory and time depend on it.

    chain: names of solver and refiners; () if nothing is pruned. grams: Gram matrices of each input. copies: of the
    activations and of the block. calibration, evaluation: (windows, tokens of each). batch, eval_batch: windows.
    budget: bytes of Gram matrices at once. activation: bytes of a waiting number. passes: of the calibration windows
    through the blocks. processes: those of torchrun, which share the windows (calibration, evaluation are of the one
    that has most) and the linears to be solved; what they send each other is not known here.
    as_stored: whether a CPU computes in the stored dtype.
    """

    chain: tuple[str, ...]
    grams: int
    copies: int
    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    batch: int
    eval_batch: int
    budget: int
    activation: int = 4
    passes: int = 2
    offload: bool = False
    saves: bool = False
    gpu: bool = False
    waits_on_cpu: bool = False
    processes: int = 1
    as_stored: bool = False

    def computing(self, shape: Shape) -> int:
        """Bytes of a number while it is computed with."""
        return shape.itemsize if self.gpu or self.as_stored else max(4, shape.itemsize)


# ---------------------------------------------------------------- memory

def phases(shape: Shape, task: Task, program: float) -> dict[str, list[Part]]:
    """{phase: its parts}: what is in memory at the peak of each. program: bytes of the program itself."""
    wide, layer = task.computing(shape), max(shape.layers, key=lambda own: own.stored)
    blocks = layer.stored if task.offload else sum(own.stored for own in shape.layers)
    freed = environment.freed_memory(layer.weights * wide)
    always = [Part("the program", program), Part("outside the blocks, stored", shape.rest * shape.itemsize),
              Part("freed, kept by the allocator", freed), Part("block, stored" if task.offload else "blocks, stored",
                                                                blocks)]
    own = layer.weights * wide * (shape.itemsize != wide or task.gpu)
    block = Part("block, computing", own, True)
    waiting = Part("activations", hidden_bytes(shape, task.calibration, task.activation) * task.copies,
                   not task.waits_on_cpu)
    largest = max(shape.embedding, shape.head, *(own.R * own.C * own.experts for own in layer.linears))
    found = {"reading": [*always, Part("checks", (shape.itemsize + 2) * largest)]}
    if task.chain:
        first = Part("embedding, computing", outside_bytes(shape, task, head=False), True)
        solving = max(solver_bytes(layer, task), batch_bytes(shape, layer, task.calibration[1], task.batch, wide),
                      0 if task.gpu else layer.stored)
        found["calibrating"] = [*always, block, first, waiting]
        teacher = [Part("block, dense", own or layer.stored, True)] * (task.copies - 1)
        found["pruning"] = [*always, block, *teacher, waiting, Part("Gram matrices", gram_bytes(layer, task), True),
                            Part("solver, or a batch", solving, True)]
    if task.evaluation[0]:
        kept = Part("activations", min(GROUP_BYTES, hidden_bytes(shape, task.evaluation, wide)), True)
        batch = batch_bytes(shape, layer, task.evaluation[1], task.eval_batch, wide)
        found["evaluating"] = [*always, block, kept, Part("a batch", batch, True)]
        tokens = task.eval_batch * task.evaluation[1]
        logits = 4 * 4 * min(SLICE, tokens * shape.vocab)
        found["evaluating, head"] = [*(always[:3] if task.offload else always), kept, Part("logits", logits, True),
                                     Part("outside the blocks, computing", outside_bytes(shape, task), True)]
    return found


def outside_bytes(shape: Shape, task: Task, head: bool = True) -> int:
    """What is outside the blocks, as it is computed with, if that is a copy; without the output head on request."""
    wide = task.computing(shape)
    return (shape.rest - (0 if head else shape.head)) * wide * (shape.itemsize != wide or task.gpu)


def hidden_bytes(shape: Shape, windows: tuple[int, int], itemsize: int) -> int:
    """Bytes of the hidden states of (windows, tokens of each)."""
    return windows[0] * windows[1] * shape.hidden * itemsize


def batch_bytes(shape: Shape, layer: Layer, tokens: int, batch: int, wide: int) -> int:
    """What a batch takes within a block: the inputs of its linears, the widest outputs, some hidden states."""
    inputs = {own.fed: own.C for own in layer.linears}
    widest = max((own.R for own in layer.linears), default=0)
    return batch * tokens * wide * (sum(inputs.values()) + 2 * widest + 4 * shape.hidden)


def gram_bytes(layer: Layer, task: Task) -> int:
    """Bytes of Gram matrices at once: all inputs of a block, or as many as the budget allows, at least one."""
    own = {linear.fed: 4 * task.grams * linear.C**2 for linear in layer.linears}
    total = sum(own[fed] * linear.experts for fed, linear in {linear.fed: linear for linear in layer.linears}.items())
    return min(total, max(task.budget, max(own.values(), default=0)))


def solver_bytes(layer: Layer, task: Task) -> int:
    """What solving one linear takes beside its weight and its statistics.

    Factoring a Gram matrix takes a copy of it that is gone when the weight's turn comes.
    """
    known = [SOLVERS.get(name, DEAREST) for name in task.chain]
    grams, copies, columns = (max(column) for column in zip(*known, strict=True))

    def of(R: int, C: int) -> float:
        kept = grams * C**2
        return 4 * max(kept + C**2 if grams else 0, kept + copies * R * C + R * min(columns, 2.7 * C))
    return int(max((of(own.R, own.C) for own in layer.linears), default=0))


def peak(found: dict[str, list[Part]], on_gpu: bool | None = None) -> tuple[str, float]:
    """(phase, bytes) of the highest peak; on_gpu: of one memory alone."""
    sums = {name: sum(part.bytes for part in parts if on_gpu is None or part.on_gpu == on_gpu)
            for name, parts in found.items()}
    return max(sums.items(), key=lambda entry: entry[1])


def disk(shape: Shape, task: Task) -> list[Part]:
    """What a run writes, at its peak, beside the model that is there."""
    blocks = sum(layer.stored for layer in shape.layers)
    if not task.chain or not (task.saves or task.offload):
        return []
    work = [Part("finished blocks" if task.saves else "pruned blocks, in the folder for temporary files", blocks)]
    whole = Part("outside the blocks" if task.offload else "checkpoint", shape.rest * shape.itemsize + (
        0 if task.offload else blocks))
    return work + ([whole] if task.saves else [])


# ---------------------------------------------------------------- work

Work = dict[str, float]


def work(shape: Shape, task: Task) -> dict[str, Work]:
    """{stage: {kind of work: how much}}."""
    blocks, rest = sum(layer.stored for layer in shape.layers), shape.rest * shape.itemsize
    wide = task.computing(shape)
    weights = sum(layer.weights for layer in shape.layers)
    found = {"start, read and check": {"start": 1, "read": blocks + rest, "hashed": blocks + rest,
                                       "touched": 4 * (blocks + rest)}}
    once = {"read": blocks, "touched": blocks + weights * wide}
    once["hashed"] = (blocks + rest) * (task.processes > 1)  # whether all have the same weights
    if task.chain:
        found["calibrate and prune"] = added(once, pruning(shape, task), {"touched": 3 * weights * wide})
    if task.saves and task.chain:
        found["save"] = {"written": blocks + rest, "hashed": 4 * blocks + 2 * rest, "touched": 3 * weights * wide,
                         "read": blocks}
    elif task.offload and task.chain:
        found["set aside"] = {"written": blocks, "touched": 3 * weights * wide}
    if task.evaluation[0]:
        tokens = task.evaluation[0] * task.evaluation[1]
        head = {"product": 2 * tokens * shape.hidden * shape.vocab, "touched": 16 * tokens * shape.vocab}
        found["evaluate"] = added(once, head, {"product": forward(shape, task.evaluation), "touched": between(
            shape, task.evaluation)})
    return found


def forward(shape: Shape, windows: tuple[int, int], layers: tuple[Layer, ...] | None = None) -> float:
    """Operations of one pass of windows through the blocks: products with weights, and attention."""
    tokens = windows[0] * windows[1]
    linears = sum(own.R * own.C * own.experts * own.active for layer in layers or shape.layers for own in layer.linears)
    return 2 * tokens * (linears + 2 * windows[1] * shape.hidden * len(layers or shape.layers))


def between(shape: Shape, windows: tuple[int, int], layers: tuple[Layer, ...] | None = None) -> float:
    """Bytes that the operations between the products of one pass touch: norms, rotary embedding, activation function,
    residuals, in float32 or with a part in it. The counts are those of transformers' Llama."""
    wide = sum(max((own.R for own in layer.linears), default=0) for layer in layers or shape.layers)
    return 4 * windows[0] * windows[1] * (20 * shape.hidden * len(layers or shape.layers) + 5 * wide)


def pruning(shape: Shape, task: Task) -> Work:
    """What calibrating and solving take: the passes, Gram matrices, the solver, the error on a sample of tokens."""
    tokens, total = task.calibration[0] * task.calibration[1], Counter()
    total["product"] = task.passes * forward(shape, task.calibration)
    total["touched"] = task.passes * between(shape, task.calibration)
    for layer in shape.layers:
        inputs = {own.fed: own for own in layer.linears}
        passes = max(1, -(-gram_bytes(layer, replace(task, budget=2**62)) // max(gram_bytes(layer, task), 1)))
        total["product"] += (passes - 1) * forward(shape, task.calibration, (layer,))
        total["touched"] += (passes - 1) * between(shape, task.calibration, (layer,))
        for own in inputs.values():
            total["product"] += own.experts * task.grams * 2 * tokens * own.active * own.C**2 * 9 / 16
            total["solve"] += own.experts * bool(task.grams) * own.C**3 / 3 / task.processes
        for own in layer.linears:
            size = own.R * own.C * own.experts / task.processes
            total["product"] += 4 * size * min(SAMPLE, tokens * task.processes)
            total["solve" if task.grams else "choice"] += size * (own.C + LOOP) if task.grams else size
    return dict(total)


def added(*parts: Work) -> Work:
    """The sum of several amounts of work."""
    return {kind: total for kind in KINDS if (total := sum(part.get(kind, 0) for part in parts))}


def seconds(work: Work, speeds: dict[str, float]) -> float:
    """How long it takes. speeds: {kind: so many a second}."""
    return sum(amount / speeds[kind] for kind, amount in work.items())


# ---------------------------------------------------------------- what fits

STEPS: dict[str, Callable[[Task, int], Task | None]] = {  # flag: (a Task, bytes of a block's Grams): a smaller Task
    "offload": lambda t, _: None if t.offload else replace(t, offload=True),
    "gram_budget": lambda t, own: replace(t, budget=min(t.budget, own) // 2) if t.grams and t.budget > LEAST else None,
    "eval_batch_size": lambda t, _: replace(t, eval_batch=t.eval_batch // 2) if t.eval_batch > 1 else None,
    "batch_size": lambda t, _: replace(t, batch=t.batch // 2) if t.batch > 1 else None,
    "activations": lambda t, _: replace(t, waits_on_cpu=True) if t.gpu and not t.waits_on_cpu else None,
    "activation_dtype": lambda t, _: replace(t, activation=2) if t.activation > 2 else None,
}


def fitted(shape: Shape, task: Task, fits: Callable[[Task], bool], free: Collection[str]) -> tuple[Task, list[str]]:
    """(a Task that fits, the flags that had to change), by STEPS in their order, each as far as it helps.

    The first change no number at all, the last rounds the activations. free: flags that may change.

    Raises ValueError if nothing fits.
    """
    changed, grams = [], max(gram_bytes(layer, replace(task, budget=2**62)) for layer in shape.layers)
    for flag in STEPS:
        while flag in free and not fits(task) and (smaller := STEPS[flag](task, grams)):
            if peaks(shape, smaller) == peaks(shape, task):
                break
            task, changed = smaller, changed + [flag] * (flag not in changed)
    if not fits(task):
        raise ValueError("nothing fits")
    return task, changed


def peaks(shape: Shape, task: Task) -> tuple[float, float]:
    """The highest peaks of both memories, without the program."""
    found = phases(shape, task, 0)
    return peak(found, False)[1], peak(found, True)[1]
