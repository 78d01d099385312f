"""Fit: make a model smaller step by step until targets are met, as long as its quality stays above floors.

    command      `oneshot fit`: its flags
    targets      what --target, --floor, --step, --budget and --allow say; whether a floor holds
    candidates   what each part loses in each form, measured
    plans        what each part gains; the plan of least loss within a round's aims
    choice       the knapsack inside
    steps        a plan as ordinary runs of `oneshot prune`; what of its result is measured
    rounds       the cycle: aim, plan, run, judge the floors, keep or take back
    ledger       the rounds of a command on disk, so that a killed one continues
    ending       the long heal at the end, plain rounding beside it, acceptance, and what the command says

Every round is an ordinary run with a record and a checkpoint of its own.
"""
