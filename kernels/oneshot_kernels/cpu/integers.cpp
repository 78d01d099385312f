// y = x Wᵀ + bias, with int8 weights (a scale for each row) or int4 (one for each row and 64 columns), 2:4 and dense, best for a
// few tokens; many of a 2:4 weight: many.h. Either x stays float32, or it is rounded to int8 on the fly, with a scale for each
// token and 64 columns: then sums are exact in int32 within those.
//
// Rows lie on SIMD lanes as in linear.cpp; a lane is 32 bits, which are four weights of its row. Dense: four columns.
// 2:4: the four kept ones of eight columns, and pshufb picks their x by three bits each. int4: a byte holds code + 8 of one
// step in its low half, that of the next in its high half.
#include <cmath>
#include <cstdlib>
#include <memory>
#include "many.h"
#include "parallel.h"
#include "vectors.h"

constexpr int BLOCK = 64;                                   // columns that share a scale of x
constexpr int APART = 16;                                   // floats between two tokens: 16 KB would be the same place in the cache
constexpr int MOST = VECTOR == 64 || VECTOR == 16 ? 8 : 4;  // tokens at once: AVX2 has half the registers

// scale: float for each row (int8), or fp16 for each block of columns and row (int4).
struct Weight { const uint8_t* values; const void* scale; int64_t blocks; bool sparse; };
struct Input { const float* plain; const uint8_t* codes; const float* scale; int64_t blocks; };  // plain null: rounded
struct Output { void* y; const void* bias; int64_t N; Type type; };

typedef uint8_t Bytes __attribute__((vector_size(VECTOR)));

// Step `step` of a stream of steps, four signed bytes a lane.
template <bool FOUR> static inline U weights(const uint8_t* v, int64_t step) {
    if (!FOUR) return load<U>(v + step * VECTOR);
    const U both = load<U>(v + step / 2 * VECTOR);
    return U(Bytes((step & 1 ? both >> 4 : both) & 0x0f0f0f0fu) - uint8_t(8));
}

// 2:4: a vector of indices, then the values that they are of: one stream of memory, not two.
template <bool FOUR> constexpr int HALF = VECTOR * (1 + (FOUR ? 2 : 4));  // bytes of half a block of columns in a tile

template <bool FOUR> constexpr int BYTES = BLOCK / 4 * VECTOR / (FOUR ? 2 : 1);  // dense: of a block of columns in a tile

// The integer sums of one block of columns, for M tokens and S tiles.
template <bool FOUR, int M, int S> ALWAYS void sparse(const uint8_t* const (&v)[S], const uint8_t* x, int64_t columns, int64_t b,
                                                      I (&acc)[M][S], I (&over)[S]) {
    for (int half = 0; half < 2; half++) {
        const uint8_t* at[S];
        U word[S];
        for (int s = 0; s < S; s++) { at[s] = v[s] + (2 * b + half) * HALF<FOUR>; word[s] = load<U>(at[s]); prefetch(at[s], HALF<FOUR>); }
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++) {
            U w[S], i[S];
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                w[s] = weights<FOUR>(at[s] + VECTOR, step);
                i[s] = (word[s] >> (2 * step) & 0x03030303u) | 0x04040000u;
                over[s] = excess(over[s], w[s]);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const U eight = broadcast8(x + m * columns + b * BLOCK + 32 * half + 8 * step);
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) acc[m][s] = dot4(acc[m][s], w[s], pick_bytes(eight, i[s]));
            }
        }
    }
}
template <bool FOUR, int M, int S> ALWAYS void dense(const uint8_t* const (&v)[S], const uint8_t* x, int64_t columns, int64_t b,
                                                     I (&acc)[M][S], I (&over)[S]) {
    for (int s = 0; s < S; s++) prefetch(v[s] + b * BYTES<FOUR>, BYTES<FOUR>);
#pragma GCC unroll 4
    for (int step = 0; step < BLOCK / 4; step++) {
        U w[S];
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            w[s] = weights<FOUR>(v[s], BLOCK / 4 * b + step);
            over[s] = excess(over[s], w[s]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            uint32_t four; std::memcpy(&four, x + m * columns + b * BLOCK + 4 * step, 4);
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) acc[m][s] = dot4(acc[m][s], w[s], U{} + four);
        }
    }
}

// Byte j of four signed ones a lane.
static inline F weight(U w, int j) { return __builtin_convertvector(I(w << (24 - 8 * j)) >> 24, F); }

// The same with x as it is.
template <bool FOUR, int M, int S> ALWAYS void sparse(const uint8_t* const (&v)[S], const float* x, int64_t columns, int64_t b,
                                                      F (&acc)[M][S]) {
    for (int half = 0; half < 2; half++) {
        const uint8_t* at[S];
        U word[S];
        for (int s = 0; s < S; s++) { at[s] = v[s] + (2 * b + half) * HALF<FOUR>; word[s] = load<U>(at[s]); prefetch(at[s], HALF<FOUR>); }
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++) {
            U w[S];
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) w[s] = weights<FOUR>(at[s] + VECTOR, step);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {  // kept weight j % 2 of group j / 2
                F kept[S];
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) kept[s] = weight(w[s], j);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const F four = broadcast4(x + m * columns + b * BLOCK + 32 * half + 8 * step + 4 * (j / 2));
#pragma GCC unroll 4
                    for (int s = 0; s < S; s++) acc[m][s] += pick(four, word[s] >> (8 * j + 2 * step)) * kept[s];
                }
            }
        }
    }
}
template <bool FOUR, int M, int S> ALWAYS void dense(const uint8_t* const (&v)[S], const float* x, int64_t columns, int64_t b,
                                                     F (&acc)[M][S]) {
    for (int s = 0; s < S; s++) prefetch(v[s] + b * BYTES<FOUR>, BYTES<FOUR>);
#pragma GCC unroll 4
    for (int step = 0; step < BLOCK / 4; step++) {
        U w[S];
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) w[s] = weights<FOUR>(v[s], BLOCK / 4 * b + step);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const float one = x[m * columns + b * BLOCK + 4 * step + j];
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) acc[m][s] += one * weight(w[s], j);
            }
    }
}

// One block of columns, without scales.
template <bool FOUR, bool PLAIN, int M, int S> ALWAYS void part(Weight w, const uint8_t* const (&v)[S], Input x, int64_t token, int64_t b,
                                                                F (&out)[M][S]) {
    const int64_t columns = w.blocks * BLOCK, first = token * columns;
    if (PLAIN) {
        for (int m = 0; m < M; m++) for (int s = 0; s < S; s++) out[m][s] = F{};
        const float* plain = x.plain + token * (columns + APART);
        if (w.sparse) sparse<FOUR, M, S>(v, plain, columns + APART, b, out);
        else dense<FOUR, M, S>(v, plain, columns + APART, b, out);
        return;
    }
    I acc[M][S] = {}, over[S] = {};
    if (w.sparse) sparse<FOUR, M, S>(v, x.codes + first, columns, b, acc, over);
    else dense<FOUR, M, S>(v, x.codes + first, columns, b, acc, over);
    for (int s = 0; s < S; s++) for (int m = 0; m < M; m++)
        out[m][s] = __builtin_convertvector(acc[m][s] - over[s], F);
}

// sum + of * x * weight, where only int4 has a scale of the weight here.
template <bool FOUR> static inline F add_scaled(F sum, F of, float x, F weight) {
    return FOUR ? add_product(sum, of * x, weight) : add_product(sum, of, F{} + x);
}

// The results of one tile for one token, rounded once, wherever it stands.
template <bool FOUR> static inline void put_rows(Weight w, Output out, int64_t tile, int64_t token, F sum) {
    const int64_t row = tile * L, left = out.N - row;
    const F bias = out.bias ? get_lanes(out.bias, row, left, out.type) : F{};
    const F scale = FOUR ? F{} + 1 : get_lanes(w.scale, row, left, FLOAT32);
    put_lanes(out.y, token * out.N + row, left, out.type, add_product(bias, sum, scale));
}

// S tiles, each `apart` tiles from the one before it.
template <bool FOUR, bool PLAIN, int M, int S> static void block(Weight w, int64_t tile, int64_t apart, Input x, Output out, int64_t token) {
    const int64_t columns = w.blocks * BLOCK, stride = w.sparse ? 2 * w.blocks * HALF<FOUR> : columns * L / (FOUR ? 2 : 1);
    const uint8_t* v[S];
    for (int s = 0; s < S; s++) v[s] = w.values + (tile + s * apart) * stride;
    F sum[M][S] = {};
    for (int64_t b = 0; b < w.blocks; b++) {
        F of[M][S];
        part<FOUR, PLAIN, M, S>(w, v, x, token, b, of);
        for (int s = 0; s < S; s++) {
            F scale = F{} + 1;
            if (FOUR) scale = load_half(static_cast<const uint16_t*>(w.scale) + ((tile + s * apart) * w.blocks + b) * L);
            for (int m = 0; m < M; m++)
                sum[m][s] = add_scaled<FOUR>(sum[m][s], of[m][s], PLAIN ? 1 : x.scale[(token + m) * w.blocks + b], scale);
        }
    }
    for (int m = 0; m < M; m++) for (int s = 0; s < S; s++) put_rows<FOUR>(w, out, tile + s * apart, token + m, sum[m][s]);
}

template <bool FOUR, bool PLAIN, int M, int S, int AT_ONCE> static void some(Weight w, int64_t tile, int64_t apart, Input x, Output out, int64_t token) {
    constexpr int STEP = S < AT_ONCE ? S : AT_ONCE;
    for (int s = 0; s < S; s += STEP) block<FOUR, PLAIN, M, STEP>(w, tile + s * apart, apart, x, out, token);
}
template <bool FOUR, bool PLAIN, int S> static void tiles(Weight w, int64_t tile, int64_t apart, Input x, Output out, int64_t tokens) {
    int64_t t = 0;
    for (; MOST >= 8 && tokens - t >= 8; t += 8) some<FOUR, PLAIN, MOST, S, 2>(w, tile, apart, x, out, t);
    for (; tokens - t >= 4; t += 4) some<FOUR, PLAIN, 4, S, 2>(w, tile, apart, x, out, t);
    for (; tokens - t >= 2; t += 2) some<FOUR, PLAIN, 2, S, 4>(w, tile, apart, x, out, t);
    for (; tokens - t >= 1; t += 1) some<FOUR, PLAIN, 1, S, 4>(w, tile, apart, x, out, t);
}

// Tiles that are read at once lie far apart, so that each is part of a long stream: memory is fetched ahead along these.
template <bool FOUR, bool PLAIN> static void all(Weight w, Input in, Output out, int64_t tokens, int64_t threads) {
    constexpr int S = 4;
    const int64_t n = (out.N + L - 1) / L, whole = n / S;
    parallel(whole + n % S, threads, [&](int64_t i) {
        if (i < whole) tiles<FOUR, PLAIN, S>(w, i, whole, in, out, tokens);
        else tiles<FOUR, PLAIN, 1>(w, whole * S + i - whole, 0, in, out, tokens);
    });
}

// One token's block: codes round(127 x / max|x|) plus `offset`. NaN or infinity anywhere makes the scale NaN, and so y.
static void quantise(const float* x, uint8_t* codes, float* scale, int offset) {
    constexpr int PARTS = BLOCK / L;
    typedef uint8_t B __attribute__((vector_size(L)));
    F most = {}, bad = {};
    for (int p = 0; p < PARTS; p++) {
        const F v = load<F>(x + p * L), size = F(U(v) & 0x7fffffffu);
        most = size > most ? size : most;
        bad += v * 0;
    }
    float largest = 0, wrong = 0;
    for (int l = 0; l < L; l++) { largest = most[l] > largest ? most[l] : largest; wrong += bad[l]; }
    const bool good = wrong == 0;
    *scale = good ? largest / 127 : wrong;
    const F inverse = F{} + (good && largest > 0 ? 127 / largest : 0), magic = F{} + 12582912.0f;  // 1.5 * 2^23: rounds to
    for (int p = 0; p < PARTS; p++) {                                                             // whole, ties to even
        const F v = good ? load<F>(x + p * L) : F{}, whole = v * inverse;
        const I code = __builtin_convertvector((whole + magic) - magic, I) + offset;
        const B bytes = __builtin_convertvector(code, B);
        std::memcpy(codes + p * L, &bytes, L);
    }
}

#include "amx_integers.h"  // with what is above
#include "expand_integers.h"

extern "C" int lanes() { return L; }

// x (tokens, K), y (tokens, N), bias (N) or null: contiguous, of `type`. values, scale: integers.py. plain: x stays as it is.
// Returns 1 without memory.
extern "C" int linear_integers(const void* x, const uint8_t* values, const void* scale, const void* bias, void* y, int64_t tokens,
                               int64_t N, int64_t K, int64_t type, int64_t bits, int64_t sparse, int64_t plain, int64_t threads) {
    const int64_t blocks = (K + BLOCK - 1) / BLOCK, columns = blocks * BLOCK, padded = (tokens + 15) / 16 * 16;
    const Weight w{values, scale, blocks, sparse != 0};
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (plain && Type(type) == BFLOAT16 && tokens > amx::FEW) {
        const amx::Result out{static_cast<uint16_t*>(y), static_cast<const uint16_t*>(bias), N, tokens};
        const auto all = bits == 4 ? (sparse ? amx::linear_many<true, true> : amx::linear_many<true, false>) : (sparse ? amx::linear_many<false, true> : amx::linear_many<false, false>);
        return !all(w, static_cast<const uint16_t*>(x), K, out, threads);
    }
    const bool in_registers = tokens > 1 && !plain;  // one token is faster on vectors
#else
    constexpr bool in_registers = false;
#endif
    const Output out{y, bias, N, Type(type)};
    if (plain && sparse && tokens >= many::TOKENS) {
        if (bits == 4) return !many::linear(Unfolded<true>{w}, x, tokens, N, K, Type(type), Rows<true>{w, out}, threads);
        return !many::linear(Unfolded<false>{w}, x, tokens, N, K, Type(type), Rows<false>{w, out}, threads);
    }
    std::unique_ptr<float, void (*)(void*)> wide(static_cast<float*>(std::aligned_alloc(64, (plain ? tokens : 1) * (columns + APART) * 4)), std::free);
    std::unique_ptr<uint8_t, void (*)(void*)> codes(plain ? nullptr : static_cast<uint8_t*>(std::aligned_alloc(64, padded * columns)), std::free);
    std::unique_ptr<float, void (*)(void*)> scales(plain ? nullptr : static_cast<float*>(std::malloc(tokens * blocks * 4)), std::free);
    if (!wide || (!plain && (!codes || !scales))) return 1;
    for (int64_t t = 0; t < tokens; t++) {
        float* row = wide.get() + (plain ? t * (columns + APART) : 0);
        widen(x, t, K, columns, Type(type), row);
        if (!plain) for (int64_t b = 0; b < blocks; b++) {
            int64_t at = t * columns + b * BLOCK;
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
            if (in_registers) at = amx::place(t, b, blocks);
#endif
            quantise(row + b * BLOCK, codes.get() + at, scales.get() + t * blocks + b, in_registers ? 0 : OFFSET);
        }
    }
    const Input in{plain ? wide.get() : nullptr, codes.get(), scales.get(), blocks};
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (in_registers) {
        const auto all = bits == 4 ? (sparse ? amx::linear<true, true> : amx::linear<true, false>) : (sparse ? amx::linear<false, true> : amx::linear<false, false>);
        all(w, codes.get(), scales.get(), out, tokens, threads);
        return 0;
    }
#endif
    if (bits == 4) plain ? all<true, true>(w, in, out, tokens, threads) : all<true, false>(w, in, out, tokens, threads);
    else plain ? all<false, true>(w, in, out, tokens, threads) : all<false, false>(w, in, out, tokens, threads);
    return 0;
}
