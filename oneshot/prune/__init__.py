"""Prune: choose which weights to remove and set those that stay, block by block.

    options         how pruning is computed
    patterns        the sparsity patterns (choice: exact counts by selection)
    linalg          linear algebra shared by the solvers
    cholesky        factors of Gram matrices, by matrix products
    solvers/        each file is a method to prune ONE linear, or to refine such a solution
    allocate/       each file is a method to distribute the zeros over the linears
    job             what to do to a model, and the rows of the record that say what was done
    linear          solve one linear, write the new weight, prove its pattern
    loop            the block loop: collect, solve, write back, heal, replay
    shared_inputs   many solutions from one pass over the dense model's inputs

`oneshot.prune(model, tokenizer, ...)` prunes a model from Python (pipeline/api.py).
"""

from ..runtime.verb import make_callable

make_callable(__name__, "oneshot.pipeline.api:prune")
