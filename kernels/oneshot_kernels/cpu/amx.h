// The tile registers of newer Xeons (AMX). One holds 16 rows of 64 bytes; a product adds to C (tokens, 16 rows of a weight)
// what A (tokens, columns of x) and B (columns, rows of the weight) give.
#pragma once
#if defined(__AMX_TILE__)
#include "parallel.h"
#include "vectors.h"

namespace amx {

constexpr int ROWS = 16, TILE = 1024, MOST = 4;  // rows of a register; its bytes; tiles of a weight at once
struct alignas(64) Shape { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; };

// How registers are used, for so many tokens: 0 to 3 are C, 4 and 5 A, 6 and 7 B.
static Shape shape_for(int64_t tokens) {
    Shape shape;
    for (int i = 0; i < 8; i++) { shape.bytes[i] = 64; shape.rows[i] = uint8_t(i < 6 && tokens < ROWS ? tokens : ROWS); }
    return shape;
}

struct Registers {  // in use as `shape` says, then as they were: torch's products remember that they have set theirs
    Shape before;
    explicit Registers(const Shape& shape) { asm volatile("sttilecfg %0; ldtilecfg %1" : "=m"(before) : "m"(shape) : "memory"); }
    ~Registers() {
        if (before.palette) asm volatile("ldtilecfg %0" :: "m"(before) : "memory");
        else asm volatile("tilerelease" ::: "memory");
    }
};
// The instructions, with the memory that they read and write: GCC's own intrinsics do not say it. A register is part of an
// instruction's text, so each has a case; loops around these are unrolled and leave none.
#define CASES(f, n) switch (n) { case 0: f(0); break; case 1: f(1); break; case 2: f(2); break; case 3: f(3); break; \
                                 case 4: f(4); break; case 5: f(5); break; case 6: f(6); break; default: f(7); }
ALWAYS void zero(int n) {
#define ZERO(n) asm volatile("tilezero %%tmm" #n ::)
    CASES(ZERO, n)
}
ALWAYS void fetch(int n, const uint8_t* from) {  // rows of 64 bytes, one behind the other
#define FETCH(n) asm volatile("tileloadd (%0,%1,1), %%tmm" #n :: "r"(from), "r"(int64_t(64)) : "memory")
    CASES(FETCH, n)
}
ALWAYS void keep(int n, void* to) {
#define KEEP(n) asm volatile("tilestored %%tmm" #n ", (%0,%1,1)" :: "r"(to), "r"(int64_t(64)) : "memory")
    CASES(KEEP, n)
}
// c += a b, for c < 4, a of 4 and 5, b of 6 and 7: pairs of bfloat16 into float32, or fours of signed bytes into int32.
template <bool INTEGERS> ALWAYS void multiply(int c, int a, int b) {
#define PRODUCT(n) do { if (a == 4) { if (b == 6) EITHER(n, 4, 6); else EITHER(n, 4, 7); } else { if (b == 6) EITHER(n, 5, 6); else EITHER(n, 5, 7); } } while (0)
#define EITHER(n, a, b) do { if (INTEGERS) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #n ::); \
                             else asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #n ::); } while (0)
    switch (c) { case 0: PRODUCT(0); break; case 1: PRODUCT(1); break; case 2: PRODUCT(2); break; default: PRODUCT(3); }
}

// Bytes of x in the order of registers, (token tile, columns, 16, 64 bytes): `steps` registers a token tile.
static inline int64_t room(int64_t tokens, int64_t steps) { return (tokens + ROWS - 1) / ROWS * steps * TILE; }
static inline int64_t place(int64_t token, int64_t step, int64_t steps) { return ((token / ROWS * steps + step) * ROWS + token % ROWS) * 64; }

// block.run<S', T>(s, t) until all tokens of S tiles are done, each time for S' tiles from the s-th on and T times 16 tokens from
// the t-th on: few tokens read all tiles at once (memory counts), more unfold each part of a tile once for 64.
template <int S, typename B> static void cover(int64_t tokens, const B& block) {
    const int64_t padded = (tokens + ROWS - 1) / ROWS * ROWS;
    int64_t t = 0;
    for (; padded - t >= 4 * ROWS; t += 4 * ROWS) for (int s = 0; s < S; s++) block.template run<1, 4>(s, t);
    if (padded - t == 3 * ROWS) { for (int s = 0; s < S; s++) block.template run<1, 3>(s, t); t += 3 * ROWS; }
    constexpr int TWO = S < 2 ? 1 : 2;
    if (padded - t == 2 * ROWS) { for (int s = 0; s < S; s += TWO) block.template run<TWO, 2>(s, t); t += 2 * ROWS; }
    if (padded > t) block.template run<S, 1>(0, t);
}

// `cover` for all N rows of a weight. block(tile, apart): for MOST tiles, `apart` from each other, or for one.
template <typename F> static void all_rows(int64_t N, int64_t tokens, int64_t threads, const F& block) {
    const Shape shape = shape_for(tokens);
    const int64_t n = (N + ROWS - 1) / ROWS, whole = n / MOST;
    parallel(whole + n % MOST, threads, [&](int64_t i) {
        const Registers used(shape);
        if (i < whole) cover<MOST>(tokens, block(i, whole));
        else cover<1>(tokens, block(whole * MOST + i - whole, 0));
    });
}

}  // namespace amx
#endif
