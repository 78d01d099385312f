// Products of bfloat16 on the tile registers of newer Xeons (AMX): what linear.cpp does, for more tokens than one.
//
// A tile register holds 16 rows of 64 bytes. TDPBF16PS adds to C (tokens, 16 rows of W) the product of A (tokens, 32 columns
// of x) and B (16 pairs of columns, 16 rows of W): the order in which a tile of a dense weight lies in memory anyway
// (layout.py). A chunk of a 2:4 weight is unfolded into a small buffer, from which the register is loaded one chunk later.
//
// C is float32; a register takes the products of a token alone, in order, so its result depends on no other token.
#pragma once
#if defined(__AMX_BF16__)
#include "parallel.h"
#include "unfold.h"
#include "vectors.h"

namespace amx {

constexpr int ROWS = 16, CHUNK = 32, TILE = 1024;  // a chunk of columns fills a register: TILE bytes
constexpr int MOST = 4;                                                // sums at once: registers 0 to 3; A: 4 and 5, B: 6 and 7

struct Weight { const uint8_t* values; const uint32_t* metadata; int64_t chunks; };  // metadata null: dense
struct alignas(64) Shape { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; };

// The instructions, with the memory that they read and write: GCC's own intrinsics do not say it. A register is part of an
// instruction's text, so each has a case; loops around these are unrolled and leave none.
#define CASES(f, n) switch (n) { case 0: f(0); break; case 1: f(1); break; case 2: f(2); break; case 3: f(3); break; \
                                 case 4: f(4); break; case 5: f(5); break; case 6: f(6); break; default: f(7); }
ALWAYS void configure(const Shape& shape) { asm volatile("ldtilecfg %0" :: "m"(shape) : "memory"); }
ALWAYS void release() { asm volatile("tilerelease" ::: "memory"); }
ALWAYS void zero(int n) {
#define ZERO(n) asm volatile("tilezero %%tmm" #n ::)
    CASES(ZERO, n)
}
ALWAYS void fetch(int n, const uint8_t* from) {  // rows of 64 bytes, one behind the other
#define FETCH(n) asm volatile("tileloadd (%0,%1,1), %%tmm" #n :: "r"(from), "r"(int64_t(64)) : "memory")
    CASES(FETCH, n)
}
ALWAYS void keep(int n, float* to) {
#define KEEP(n) asm volatile("tilestored %%tmm" #n ", (%0,%1,1)" :: "r"(to), "r"(int64_t(64)) : "memory")
    CASES(KEEP, n)
}
ALWAYS void multiply(int c, int a, int b) {  // c += a b, for c < 4, a of 4 and 5, b of 6 and 7
#define PRODUCT(n) do { if (a == 4) { if (b == 6) DO(n, 4, 6); else DO(n, 4, 7); } else { if (b == 6) DO(n, 5, 6); else DO(n, 5, 7); } } while (0)
#define DO(n, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #n ::)
    switch (c) { case 0: PRODUCT(0); break; case 1: PRODUCT(1); break; case 2: PRODUCT(2); break; default: PRODUCT(3); }
}

// The sums of S tiles and T times 16 tokens, in registers s * T + t. x: (token tile, chunk, 16, CHUNK).
template <bool SPARSE, int S, int T> ALWAYS void sums(Weight w, int64_t tile, int64_t apart, const uint8_t* x) {
    alignas(64) uint8_t buffer[2][S][TILE];
    const int64_t stride = w.chunks * (SPARSE ? TILE / 2 : TILE);
    const uint8_t* v[S]; const uint32_t* meta[S];
    for (int s = 0; s < S; s++) { v[s] = w.values + (tile + s * apart) * stride; meta[s] = w.metadata + (tile + s * apart) * w.chunks * ROWS; }
#pragma GCC unroll 4
    for (int i = 0; i < S * T; i++) zero(i);
    for (int64_t c = 0; c < w.chunks + SPARSE; c++) {
        if (SPARSE && c < w.chunks)
            for (int s = 0; s < S; s++) unfold(v[s] + c * (TILE / 2), meta[s] + c * ROWS, buffer[c & 1][s]);
        const int64_t now = c - SPARSE;  // the stores of a chunk have arrived when the next one is unfolded
        if (now < 0) continue;
        if (T == 1) fetch(4, x + now * TILE);
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            fetch(6 + s % 2, SPARSE ? buffer[now & 1][s] : v[s] + now * TILE);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                if (T > 1) fetch(4 + t % 2, x + (t * w.chunks + now) * TILE);
                multiply(s * T + t, 4 + t % 2, 6 + s % 2);
            }
        }
    }
}

struct Output { uint16_t* y; const uint16_t* bias; int64_t N, tokens; };

template <bool SPARSE, int S, int T> static void block(Weight w, int64_t tile, int64_t apart, const uint8_t* x, int64_t token, Output out) {
    sums<SPARSE, S, T>(w, tile, apart, x + token * w.chunks * 2 * CHUNK);
#pragma GCC unroll 4
    for (int i = 0; i < S * T; i++) {
        alignas(64) float sum[ROWS][ROWS] = {};
        keep(i, sum[0]);
        const int64_t row = (tile + i / T * apart) * ROWS, rows = out.N - row < ROWS ? out.N - row : ROWS;
        float bias[ROWS] = {};
        if (out.bias) for (int64_t r = 0; r < rows; r++) bias[r] = bf16_to_float(out.bias[row + r]);
        const int64_t from = token + i % T * ROWS, to = from + ROWS < out.tokens ? from + ROWS : out.tokens;
        for (int64_t m = from; m < to; m++) {
            uint16_t short_[ROWS];
            for (int r = 0; r < ROWS; r++) short_[r] = float_to_bf16(sum[m - from][r] + bias[r]);
            std::memcpy(out.y + m * out.N + row, short_, 2 * rows);
        }
    }
}

// All tokens of S tiles: few tokens read all of them at once (memory counts), more unfold each chunk once for 64.
template <bool SPARSE, int S> static void tiles(Weight w, int64_t tile, int64_t apart, const uint8_t* x, Output out) {
    const int64_t padded = (out.tokens + ROWS - 1) / ROWS * ROWS;
    int64_t t = 0;
    for (; padded - t >= 3 * ROWS; t += 4 * ROWS < padded - t ? 4 * ROWS : padded - t)
        for (int s = 0; s < S; s++) {
            if (padded - t >= 4 * ROWS) block<SPARSE, 1, 4>(w, tile + s * apart, 0, x, t, out);
            else block<SPARSE, 1, 3>(w, tile + s * apart, 0, x, t, out);
        }
    for (; padded - t >= 2 * ROWS; t += 2 * ROWS)
        for (int s = 0; s < S; s += S < 2 ? 1 : 2) block<SPARSE, S < 2 ? 1 : 2, 2>(w, tile + s * apart, apart, x, t, out);
    for (; padded > t; t += ROWS) block<SPARSE, S, 1>(w, tile, apart, x, t, out);
}

// y = x Wᵀ + bias. x: (tokens, K), K columns of w.chunks * CHUNK. space: bytes for x in the order of registers, see `room`.
template <bool SPARSE> static void linear(Weight w, const uint16_t* x, int64_t K, uint8_t* space, Output out, int64_t threads) {
    for (int64_t m = 0; m < out.tokens; m++) for (int64_t c = 0; c < w.chunks; c++) {
        uint8_t* to = space + ((m / ROWS * w.chunks + c) * ROWS + m % ROWS) * 2 * CHUNK;
        const int64_t columns = K - c * CHUNK < CHUNK ? K - c * CHUNK : CHUNK;
        std::memcpy(to, x + m * K + c * CHUNK, 2 * columns);
        std::memset(to + 2 * columns, 0, 2 * (CHUNK - columns));
    }
    Shape shape;
    const int64_t rows = out.tokens < ROWS ? out.tokens : ROWS;
    for (int i = 0; i < 8; i++) { shape.bytes[i] = 64; shape.rows[i] = uint8_t(i < 6 ? rows : ROWS); }
    const int64_t n = (out.N + ROWS - 1) / ROWS, whole = n / MOST;
    parallel(whole + n % MOST, threads, [&](int64_t i) {
        configure(shape);
        if (i < whole) tiles<SPARSE, MOST>(w, i, whole, space, out);
        else tiles<SPARSE, 1>(w, whole * MOST + i - whole, 0, space, out);
        release();
    });
}
static int64_t room(int64_t tokens, int64_t chunks) { return (tokens + ROWS - 1) / ROWS * chunks * TILE; }

}  // namespace amx
#endif
