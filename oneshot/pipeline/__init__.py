"""Pipeline: the only stage that knows the order of the others.

    run       one run from start to end, and the command `oneshot prune`
    plan      which linear gets which pattern, and the job made from that
    compress  prune or round a model, and prove the result
    shrink    make the model smaller before it is pruned (shrink_command: `oneshot shrink`)
    uneven    widths by layer for it
    lesson    what healing on text needs: the text, the dense model's predictions, a place for checkpoints
              (heal_command: `oneshot heal`)
    rounding  `--quantise`: round what is kept, after everything else
    identity  a run's identity (run_id), and the warnings that come first
    command   what the runs of one command share
    checks    what is rejected before anything is computed
    offloading  what goes with `--offload disk`
    idle      flags that would change nothing
    api       `oneshot.prune` for Python
    fit/      `oneshot fit`: smaller step by step, to targets, with floors under quality
    forms     how the linears of a block can be stored (2:4, int8, int4), and what computes with them here
    device_table     what every part of a model costs on a device (latency_command: `oneshot latency`)
    sizes     how large a model's parts are
    task      what a run does, of its settings, as far as memory and time depend on it
    forecast  memory, disk and work of a run, from sizes and settings alone
    machine   how fast this machine does each kind of work (plan_command: `oneshot plan`)
    attempt   a run that ends in a record even if it fails, for sweeps
    generate  `oneshot generate`: generate text, measure the speed
"""
