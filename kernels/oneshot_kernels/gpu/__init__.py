"""The kernels for GPUs, in Triton.

    fragment   the weight order of the tensor cores  prefill    many tokens
    mma_sp     the sparse tensor-core instruction    selftest   check the decode kernel on the GPU itself
    decode     1 to 64 tokens                        tune       measure the kernels on your GPU
    expand     64 to 512 tokens, every other GPU     timing     measure kernel times
    column_loop  SparseGPT's loop over the columns
"""
