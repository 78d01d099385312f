"""The kernels for NVIDIA GPUs, in Triton.

    fragment   the order the tensor cores want       prefill    many tokens
    mma_sp     the sparse tensor-core instruction    selftest   asks the GPU whether decode is right
    decode     1 to 64 tokens                        tune       measures the kernels on your GPU
    expand     64 to 512 tokens, every other GPU     timing     how
"""
