"""Runtime: what the program stands on: the machine, files that are whole or absent, commands and their exit codes.

    environment   versions, device, memory
    files         write whole or not at all
    command       one place for errors and exit codes of every command
    flag          how a stage declares a flag of its own
"""
