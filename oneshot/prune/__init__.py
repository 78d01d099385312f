"""Prune: choose and set weights, block by block.

    options         how pruning computes
    patterns        which shapes of sparsity there are
    linalg          what solvers share
    solvers/        one file, one way to choose and set the weights of ONE linear, or to refine them
    allocate/       one file, one way to spread the zeros over the linears
    loop            the block loop: collect, solve, write back, heal, replay
    shared_inputs   many solutions from one pass over the dense model's inputs

`oneshot.prune(model, tokenizer, ...)` prunes a model from Python (pipeline/api.py).
"""

from ..runtime.verb import make_callable

make_callable(__name__, "oneshot.pipeline.api:prune")
