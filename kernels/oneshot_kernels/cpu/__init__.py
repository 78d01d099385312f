"""C++ for CPUs, compiled on first use and called through ctypes.

    build     compile a source into the cache          library   load the variant for this CPU, after a self-test
    parallel.h  torch's own threads                    vectors.h  one vector of rows, on three processors
    unfold.h  2:4 to dense, 32 columns of 16 rows      expand_integers.h  integers for many tokens
    many.h    2:4 for many tokens, which lie on SIMD lanes
    amx.h     tile registers of newer Xeons; amx_floats.h and amx_integers.h compute linear and integers on them,
              amx_many.h both for many tokens
    column_loop  SparseGPT's loop over the columns     linear     2:4 and dense layers
    integers  the same with int8 or int4 weights and int8 inputs       codes      their codes and scales
    step      one token of a Llama-like model in one call, described by step.h      decode  transformers' generate by it
    cache     room for keys and values in transformers' cache
    layout    tiles: how their weights lie             bandwidth  the read limit        tune  measure, for dispatch
"""
