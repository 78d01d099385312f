"""Quantise: round weights to integers. One file, one method.

    grids   the integer formats and their exact bytes
    rtn     round to nearest: no data, no search

A method is a module with `quantise_model(model, grid) -> warnings`, which rounds every prunable linear of an offloaded
model in place. A weight that is zero stays zero.
"""
