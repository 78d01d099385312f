// integers.cpp on the tile registers of newer Xeons (AMX): more tokens than one whose x is rounded to int8, and in the end many
// bfloat16 ones that are not.
//
// TDPBSSD multiplies A (tokens, 64 columns of x, which share a scale) by B (16 fours of columns, 16 rows of W), exactly: the
// order of a dense int8 weight in memory. Int4 and 2:4 weights are unfolded, a block of columns at a time, into a small buffer,
// from which the register is loaded one block later. Sums then get their scales, as on vectors, and in the same order.
#pragma once
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include "amx.h"
#include "amx_many.h"

namespace amx {

constexpr int STEPS = BLOCK / 4;  // rows of B
constexpr int64_t FEW = 8;        // tokens that are faster on vectors if they are not rounded

// Where a lane's four columns come from, for each four bits (the positions of a group's two kept values): bytes 0 and 1 of the
// lane for the first group of a step, 2 and 3 for the second; 0x80 gives zero.
struct Places {
    alignas(64) uint32_t group[2][16];
    Places() {
        for (int g = 0; g < 2; g++) for (uint32_t code = 0; code < 16; code++) {
            uint32_t bytes = 0x80808080u;
            for (uint32_t kept = 0; kept < 2; kept++) {
                const uint32_t shift = 8 * (code >> 2 * kept & 3);
                bytes = (bytes & ~(0xffu << shift)) | (2 * g + kept) << shift;
            }
            group[g][code] = bytes;
        }
    }
};
static const Places places;

// A block of columns of one tile as it is in a register. v: where the block begins in the tile. out: TILE bytes, on 64.
template <bool FOUR, bool SPARSE> static inline void unfold(const uint8_t* v, uint8_t* out) {
    if (!SPARSE) {
#pragma GCC unroll 16
        for (int step = 0; step < STEPS; step++) { const U w = weights<FOUR>(v, step); std::memcpy(out + 64 * step, &w, 64); }
        return;
    }
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // a shuffle is among 16 bytes
    for (int half = 0; half < 2; half++) {
        const uint8_t* at = v + half * HALF<FOUR>;
        const U word = load<U>(at);
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++) {
            const __m512i kept = __m512i(weights<FOUR>(at + VECTOR, step));
            const U position = word >> (2 * step) & 0x03030303u;
            const U code[2] = {position | position >> 6, position >> 16 | position >> 22};  // the lowest four bits count
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++) {
                const __m512i from = _mm512_permutexvar_epi32(__m512i(code[g]), _mm512_load_si512(places.group[g]));
                _mm512_store_si512(out + 64 * (8 * half + 2 * step + g), _mm512_shuffle_epi8(kept, _mm512_or_si512(from, lane)));
            }
        }
    }
}

template <bool FOUR, bool SPARSE> constexpr int64_t BYTES = SPARSE ? 2 * HALF<FOUR> : TILE / (FOUR ? 2 : 1);  // of a block of a tile

// For `many`, two chunks a block. int8: codes as bfloat16, which is exact, and the rows' scales in the end. int4: scale times
// code, rounded to bfloat16.
template <bool FOUR, bool SPARSE> struct Codes {
    Weight w; int64_t N, chunks;

    F scale(int64_t tile) const {
        F own = F{} + 1;
        if (!FOUR) for (int64_t r = 0; r < ROWS && tile * ROWS + r < N; r++) own[r] = static_cast<const float*>(w.scale)[tile * ROWS + r];
        return own;
    }
    const uint8_t* in_registers(int64_t tile, int64_t first, int64_t count, uint8_t* buffer) const {
        alignas(64) uint8_t block[TILE];
        for (int64_t c = 0; c < count; c += 2) {
            const int64_t at = tile * w.blocks + (first + c) / 2;
            unfold<FOUR, SPARSE>(w.values + at * BYTES<FOUR, SPARSE>, block);
            F own = F{} + 1;
            if (FOUR) own = load_half(static_cast<const uint16_t*>(w.scale) + at * L);
            for (int step = 0; step < STEPS; step++) for (int pair = 0; pair < 2; pair++) {
                const I four = load<I>(block + 64 * step);
                const F a = __builtin_convertvector(four << (24 - 16 * pair) >> 24, F), b = __builtin_convertvector(four << (16 - 16 * pair) >> 24, F);
                const U both = FOUR ? rounded_number(a * own) | rounded_number(b * own) << 16 : U(a) >> 16 | U(b);
                std::memcpy(buffer + c * TILE + 128 * step + 64 * pair, &both, 64);
            }
        }
        return buffer;
    }
};

// For `cover`: S tiles of a weight, each `apart` tiles from the one before it, and all tokens. x: codes, see `room`.
template <bool FOUR, bool SPARSE> struct Block {
    static constexpr bool UNFOLD = FOUR || SPARSE;
    Weight w; int64_t tile, apart; const uint8_t* x; const float* scale; Output out; int64_t tokens;

    template <int S, int T> void run(int s0, int64_t token) const {
        alignas(64) uint8_t buffer[2][S][TILE];
        alignas(64) int32_t raw[S * T][ROWS][ROWS];
        F sum[S * T][ROWS] = {};
        const uint8_t *v[S], *codes = x + place(token, 0, w.blocks);
        int64_t count[T];  // tokens of each 16
        for (int s = 0; s < S; s++) v[s] = w.values + (tile + (s0 + s) * apart) * w.blocks * BYTES<FOUR, SPARSE>;
        for (int t = 0; t < T; t++) count[t] = tokens - token - t * ROWS < ROWS ? tokens - token - t * ROWS : ROWS;
        for (int64_t b = 0; b < w.blocks + UNFOLD; b++) {
            for (int s = 0; s < S; s++) prefetch(v[s] + b * BYTES<FOUR, SPARSE>, BYTES<FOUR, SPARSE>);
            if (UNFOLD && b < w.blocks) for (int s = 0; s < S; s++) unfold<FOUR, SPARSE>(v[s] + b * BYTES<FOUR, SPARSE>, buffer[b & 1][s]);
            const int64_t now = b - UNFOLD;  // the stores of a block have arrived when the next one is unfolded
            if (now < 0) continue;
            if (T == 1) fetch(4, codes + now * TILE);
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                fetch(6 + s % 2, UNFOLD ? buffer[now & 1][s] : v[s] + now * BYTES<FOUR, SPARSE>);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    if (T > 1) fetch(4 + t % 2, codes + (t * w.blocks + now) * TILE);
                    zero(s * T + t);
                    multiply<true>(s * T + t, 4 + t % 2, 6 + s % 2);
                    keep(s * T + t, raw[s * T + t]);
                }
            }
            for (int s = 0; s < S; s++) {
                F own = F{} + 1;
                if (FOUR) own = load_half(static_cast<const uint16_t*>(w.scale) + ((tile + (s0 + s) * apart) * w.blocks + now) * L);
                for (int t = 0; t < T; t++) for (int64_t m = 0; m < count[t]; m++) {
                    const F of = __builtin_convertvector(load<I>(raw[s * T + t][m]), F);
                    F& total = sum[s * T + t][m];
                    total = add_scaled<FOUR>(total, of, scale[(token + t * ROWS + m) * w.blocks + now], own);
                }
            }
        }
        for (int i = 0; i < S * T; i++) for (int64_t m = 0; m < count[i % T]; m++)
            put_rows<FOUR>(w, out, tile + (s0 + i / T) * apart, token + i % T * ROWS + m, sum[i][m]);
    }
};

template <bool FOUR, bool SPARSE> static void linear(Weight w, const uint8_t* x, const float* scale, Output out, int64_t tokens, int64_t threads) {
    all_rows(out.N, tokens, threads, [&](int64_t tile, int64_t apart) { return Block<FOUR, SPARSE>{w, tile, apart, x, scale, out, tokens}; });
}

// As `linear`, for a bfloat16 x that is not rounded. Returns whether there was memory.
template <bool FOUR, bool SPARSE> static bool linear_many(Weight w, const uint16_t* x, int64_t K, const Result& out, int64_t threads) {
    std::unique_ptr<uint8_t, void (*)(void*)> space(static_cast<uint8_t*>(std::aligned_alloc(64, room_for_many(out.tokens, 2 * w.blocks))), std::free);
    if (space) many(Codes<FOUR, SPARSE>{w, out.N, 2 * w.blocks}, x, K, space.get(), out, threads);
    return space != nullptr;
}

}  // namespace amx
#endif
