// What step.cpp is told of a model; step.py has the same structures.
#pragma once
#include <cstdint>

typedef int (*Floats)(const void*, const uint8_t*, const uint32_t*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t);
typedef int (*Integers)(const void*, const uint8_t*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t, int64_t);

// A weight (N, K). form: 0 row by row, 1 tiles of linear.cpp, 8 or 4 bits of integers.cpp, 2:4 with 16 added, inputs that stay as
// they are with 32 added. N is 0 where there is none.
struct Linear { const uint8_t* values; const uint32_t* indices; const void* scale; const void* bias; int64_t N, K, form; };

// qkv, gate_up: one weight with the rows of all, or one each. *_norm: gains, or null. keys, cached: (kv_heads, capacity, head_dim).
struct Block {
    Linear qkv[3], o, gate_up[2], down;
    const void *before, *after, *q_norm, *k_norm;
    void *keys, *cached;
};

// cosines, sines: (positions, head_dim). mlp: of the widest block.
struct Model {
    const Block* blocks;
    int64_t count, hidden, heads, kv_heads, head_dim, mlp, type, threads;
    double eps, scaling;
    const float *cosines, *sines;
    const void* norm;
    Linear head;
    Floats floats;
    Integers integers;
};
