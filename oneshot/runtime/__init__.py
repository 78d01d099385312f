"""Runtime: what every other stage builds on: the machine, atomic file writes, commands and their exit codes.

    environment   versions, device, memory
    files         atomic writes
    inputs        input that others wrote: files, JSON, strings of any content
    sealed        JSON files that contain their own hash, and those of files beside them
    lock          a file that one process holds at a time
    hub           whether the Hugging Face hub may be asked, and whether it answers
    command       error handling and exit codes, in one place for every command
    products      how float32 matrices are multiplied
    flag          how a stage declares its command-line flags
    distributed   several processes under torchrun: joining them, putting together what each finds
    together      what rank 0 lets the others do
    proof         check a promised result at run time
    verb          a subpackage that can also be called as a function (`oneshot.prune`)
"""
