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
#include "unfold.h"

namespace amx {

constexpr int CHUNK = 32;  // columns that fill a register

struct Weight { const uint8_t* values; const uint32_t* metadata; int64_t chunks; };  // metadata null: dense

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
                multiply<false>(s * T + t, 4 + t % 2, 6 + s % 2);
            }
        }
    }
}

struct Output { uint16_t* y; const uint16_t* bias; int64_t N, tokens; };

// For `cover`: S tiles of a weight, each `apart` tiles from the one before it, and all tokens.
template <bool SPARSE> struct Block {
    Weight w; int64_t tile, apart; const uint8_t* x; Output out;

    template <int S, int T> void run(int s, int64_t token) const {
        sums<SPARSE, S, T>(w, tile + s * apart, apart, x + place(token, 0, w.chunks));
#pragma GCC unroll 4
        for (int i = 0; i < S * T; i++) {
            alignas(64) float sum[ROWS][ROWS] = {};
            keep(i, sum);
            const int64_t row = (tile + (s + i / T) * apart) * ROWS, rows = out.N - row < ROWS ? out.N - row : ROWS;
            float bias[ROWS] = {};
            if (out.bias) for (int64_t r = 0; r < rows; r++) bias[r] = bf16_to_float(out.bias[row + r]);
            const int64_t from = token + i % T * ROWS, to = from + ROWS < out.tokens ? from + ROWS : out.tokens;
            for (int64_t m = from; m < to; m++) {
                uint16_t rounded[ROWS];
                for (int r = 0; r < ROWS; r++) rounded[r] = float_to_bf16(sum[m - from][r] + bias[r]);
                std::memcpy(out.y + m * out.N + row, rounded, 2 * rows);
            }
        }
    }
};

// y = x Wᵀ + bias. x: (tokens, K), K of w.chunks * CHUNK columns. space: room(tokens, w.chunks) bytes, on 64.
template <bool SPARSE> static void linear(Weight w, const uint16_t* x, int64_t K, uint8_t* space, Output out, int64_t threads) {
    for (int64_t m = 0; m < out.tokens; m++) for (int64_t c = 0; c < w.chunks; c++) {
        uint8_t* to = space + place(m, c, w.chunks);
        const int64_t columns = K - c * CHUNK < CHUNK ? K - c * CHUNK : CHUNK;
        std::memcpy(to, x + m * K + c * CHUNK, 2 * columns);
        std::memset(to + 2 * columns, 0, 2 * (CHUNK - columns));
    }
    all_rows(out.N, out.tokens, threads, [&](int64_t tile, int64_t apart) { return Block<SPARSE>{w, tile, apart, space, out}; });
}

}  // namespace amx
#endif
