"""Runtime: what every other stage builds on: the machine, atomic file writes, commands and their exit codes.

    environment   versions, device, memory
    files         atomic writes
    command       error handling and exit codes, in one place for every command
    flag          how a stage declares its command-line flags
    proof         check a promised result at run time
    verb          a subpackage that can also be called as a function (`oneshot.prune`)
"""
