"""C++ for CPUs, compiled on first use and called through ctypes.

    build     compile a source into the cache          library   load the variant for this CPU, after a self-test
    parallel.h   torch's own threads                   column_loop   SparseGPT's loop over the columns of a block
"""
