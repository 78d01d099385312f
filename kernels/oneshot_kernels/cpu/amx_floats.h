// Products of bfloat16 on the tile registers of newer Xeons (AMX): what linear.cpp does, for more tokens than one.
//
// TDPBF16PS multiplies A (tokens, 32 columns of x) by B (16 pairs of columns, 16 rows of W): the order in which a tile of a
// dense weight lies in memory anyway (layout.py). A chunk of a 2:4 weight is unfolded into a small buffer, from which the
// register is loaded one chunk later.
//
// C is float32; it takes the products of each token by itself, in order, so a result depends on no other token.
#pragma once
#if defined(__AMX_BF16__)
#include "amx.h"
#include "amx_many.h"
#include "unfold.h"

namespace amx {

// metadata: of a 2:4 weight
template <bool SPARSE> struct Weight {
    const uint8_t* values; const uint32_t* metadata; int64_t chunks;
    static constexpr int BYTES = SPARSE ? TILE / 2 : TILE;  // of a chunk of a tile

    const uint8_t* at(int64_t tile, int64_t chunk) const { return values + (tile * chunks + chunk) * BYTES; }
    void unfold_to(int64_t tile, int64_t chunk, uint8_t* out) const { unfold(at(tile, chunk), metadata + (tile * chunks + chunk) * ROWS, out); }
    F scale(int64_t) const { return F{} + 1; }
    const uint8_t* in_registers(int64_t tile, int64_t first, int64_t count, uint8_t* buffer) const {  // for `many`
        if (!SPARSE) return at(tile, first);
        for (int64_t c = 0; c < count; c++) unfold_to(tile, first + c, buffer + c * TILE);
        return buffer;
    }
};

// The sums of S tiles and T times 16 tokens, in registers s * T + t. x: (token tile, chunk, 16, CHUNK).
template <bool SPARSE, int S, int T> ALWAYS void sums(Weight<SPARSE> w, int64_t tile, int64_t apart, const uint8_t* x) {
    alignas(64) uint8_t buffer[2][S][TILE];
#pragma GCC unroll 4
    for (int i = 0; i < S * T; i++) zero(i);
    for (int64_t c = 0; c < w.chunks + SPARSE; c++) {
        for (int s = 0; s < S; s++) prefetch(w.at(tile + s * apart, c), w.BYTES);
        if (SPARSE && c < w.chunks)
            for (int s = 0; s < S; s++) w.unfold_to(tile + s * apart, c, buffer[c & 1][s]);
        const int64_t now = c - SPARSE;  // the stores of a chunk have arrived when the next one is unfolded
        if (now < 0) continue;
        if (T == 1) fetch(4, x + now * TILE);
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            fetch(6 + s % 2, SPARSE ? buffer[now & 1][s] : w.at(tile + s * apart, now));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                if (T > 1) fetch(4 + t % 2, x + (t * w.chunks + now) * TILE);
                multiply<false>(s * T + t, 4 + t % 2, 6 + s % 2);
            }
        }
    }
}

// For `cover`: S tiles of a weight, each `apart` tiles from the one before it, and all tokens.
template <bool SPARSE> struct Block {
    Weight<SPARSE> w; int64_t tile, apart; const uint8_t* x; Result out;

    template <int S, int T> void run(int s, int64_t token) const {
        sums<SPARSE, S, T>(w, tile + s * apart, apart, x + place(token, 0, w.chunks));
#pragma GCC unroll 4
        for (int i = 0; i < S * T; i++) {
            alignas(64) float sum[ROWS][ROWS];
            keep(i, sum);
            const int64_t own = tile + (s + i / T) * apart, from = token + i % T * ROWS, to = from + ROWS < out.tokens ? from + ROWS : out.tokens;
            const F bias = bias_of(out, own);
            for (int64_t m = from; m < to; m++) write_rows(load<F>(sum[m - from]) + bias, own, m, out);
        }
    }
};

constexpr int64_t MANY = 65;  // tokens, and more: every 64 unfold a weight anew

// Bytes of x in the order of registers.
static inline int64_t room_for(int64_t tokens, int64_t chunks) { return tokens < MANY ? room(tokens, chunks) : room_for_many(tokens, chunks); }

// y = x Wᵀ + bias. x: (tokens, K), K of w.chunks * CHUNK columns. space: room_for(tokens, w.chunks) bytes, on 64.
template <bool SPARSE> static void linear(Weight<SPARSE> w, const uint16_t* x, int64_t K, uint8_t* space, const Result& out, int64_t threads) {
    if (out.tokens >= MANY) return many(w, x, K, space, out, threads);
    for (int64_t m = 0; m < out.tokens; m++) for (int64_t c = 0; c < w.chunks; c++)
        copy_chunk(x + m * K + c * CHUNK, K - c * CHUNK, space + place(m, c, w.chunks));
    all_rows(out.N, out.tokens, threads, [&](int64_t tile, int64_t apart) { return Block<SPARSE>{w, tile, apart, space, out}; });
}

}  // namespace amx
#endif
