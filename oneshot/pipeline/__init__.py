"""Pipeline: the only stage that knows the order of the others.

    run       the story of one run, and the command `oneshot prune`
    plan      which linear gets which pattern, and the job that is made of it
    compress  prune or round a model by its plan, and prove what it then is
    identity  what a run is known by, what its reader should know first
    command   what the runs of one command share
    checks    what is refused before anything is computed
    api       the same from Python
    attempt   a run that ends in a record even where it fails: for sweeps
    generate  `oneshot generate`: continue a text, say how fast
"""
