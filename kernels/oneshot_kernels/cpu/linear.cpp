// y = x Wᵀ + bias, 2:4 and dense, values in float32, bfloat16, float16. Here few tokens, with rows of W on SIMD lanes; many of a
// 2:4 weight: many.h, bfloat16 on tile registers: amx_floats.h.
//
// A tile is L rows (layout.py says how they lie in memory; L depends on the variant). Each lane adds up its own row, so
// there are no horizontal sums, and a thread reads every byte of the weight once, in order, four tiles at a time: one
// address stream does not reach the memory's speed. 2:4: for a group of four columns x's four numbers are broadcast,
// each lane picks the two that it needs by two bits each, and multiplies. 16 pairs of bits are one word, used up by
// shifting. Sums are moved to a second accumulator every 64 columns, which keeps rounding errors small.
#include <cstdlib>
#include <memory>
#include "amx_floats.h"
#include "many.h"
#include "parallel.h"
#include "unfold.h"
#include "vectors.h"

constexpr int CHUNK = 32, GROUPS = CHUNK / 4, FLUSH = 2;  // columns; groups of four; chunks between two flushes
constexpr int MOST = VECTOR == 64 || VECTOR == 16 ? 8 : 4;  // tokens at once: AVX2 has half the registers

// How the two kept values of a group (2:4), or two columns (dense), lie in memory.
struct Float32 { static constexpr int BYTES = 8 * L; static void two(const uint8_t* p, F& a, F& b) { a = load<F>(p); b = load<F>(p + 4 * L); } };
struct Float16 { static constexpr int BYTES = 4 * L; static void two(const uint8_t* p, F& a, F& b) { a = load_half(p); b = load_half(p + 2 * L); } };
struct BFloat16 {  // one word per lane: the first in its low half
    static constexpr int BYTES = 4 * L;
    static void two(const uint8_t* p, F& a, F& b) { U v = load<U>(p); a = F(v << 16); b = F(v & 0xffff0000u); }
};

struct Weight { const uint8_t* values; const uint32_t* metadata; int64_t chunks; };  // metadata null: dense

template <typename D, int M, int S> ALWAYS void sparse(Weight w, int64_t tile, int64_t apart, const float* x, F (*sum)[S]) {
    const int64_t stride = w.chunks * GROUPS * D::BYTES;
    const uint8_t* v[S]; const uint32_t* meta[S];
    for (int s = 0; s < S; s++) { v[s] = w.values + (tile + s * apart) * stride; meta[s] = w.metadata + (tile + s * apart) * w.chunks * L; }
    for (int64_t first = 0; first < w.chunks; first += FLUSH) {
        F acc[M][S] = {};
        const int64_t end = first + FLUSH < w.chunks ? first + FLUSH : w.chunks;
        for (int64_t c = first; c < end; c++) {
            U index[S];
            for (int s = 0; s < S; s++) prefetch(v[s] + c * GROUPS * D::BYTES, GROUPS * D::BYTES);
            for (int s = 0; s < S; s++) index[s] = load<U>(meta[s] + c * L);
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; g++) {
                F a[S], b[S];
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) D::two(v[s] + (c * GROUPS + g) * D::BYTES, a[s], b[s]);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const F four = broadcast4(x + m * w.chunks * CHUNK + c * CHUNK + 4 * g);
#pragma GCC unroll 4
                    for (int s = 0; s < S; s++) {
                        acc[m][s] += pick(four, index[s]) * a[s];
                        acc[m][s] += pick(four, index[s] >> 2) * b[s];
                    }
                }
                for (int s = 0; s < S; s++) index[s] >>= 4;
            }
        }
        for (int m = 0; m < M; m++) for (int s = 0; s < S; s++) sum[m][s] += acc[m][s];
    }
}

template <typename D, int M, int S> ALWAYS void dense(Weight w, int64_t tile, int64_t apart, const float* x, F (*sum)[S]) {
    const int64_t stride = w.chunks * (CHUNK / 2) * D::BYTES;
    const uint8_t* v[S];
    for (int s = 0; s < S; s++) v[s] = w.values + (tile + s * apart) * stride;
    for (int64_t first = 0; first < w.chunks; first += FLUSH) {
        F acc[M][S] = {};
        const int64_t end = first + FLUSH < w.chunks ? first + FLUSH : w.chunks;
        for (int64_t c = first; c < end; c++) {
            for (int s = 0; s < S; s++) prefetch(v[s] + c * (CHUNK / 2) * D::BYTES, CHUNK / 2 * D::BYTES);
#pragma GCC unroll 4
            for (int g = 0; g < CHUNK / 2; g++) {
                const float* at = x + c * CHUNK + 2 * g;
                F a[S], b[S];
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) D::two(v[s] + (c * (CHUNK / 2) + g) * D::BYTES, a[s], b[s]);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const float first = at[m * w.chunks * CHUNK], second = at[m * w.chunks * CHUNK + 1];
#pragma GCC unroll 4
                    for (int s = 0; s < S; s++) {
                        acc[m][s] += first * a[s];
                        acc[m][s] += second * b[s];
                    }
                }
            }
        }
        for (int m = 0; m < M; m++) for (int s = 0; s < S; s++) sum[m][s] += acc[m][s];
    }
}

struct Output {
    void* y; const void* bias; int64_t N; Type type;

    void write(int64_t tile, int64_t token, F sum) const {  // the rows of a tile for a token
        const int64_t row = tile * L;
        put_lanes(y, token * N + row, N - row, type, sum + (bias ? get_lanes(bias, row, N - row, type) : F{}));
    }
};

// S tiles, each `apart` tiles from the one before it.
template <typename D, int M, int S> static void block(Weight w, int64_t tile, int64_t apart, const float* x, Output out, int64_t token) {
    F sum[M][S] = {};
    if (w.metadata) sparse<D, M, S>(w, tile, apart, x, sum);
    else dense<D, M, S>(w, tile, apart, x, sum);
    for (int m = 0; m < M; m++) for (int s = 0; s < S; s++) out.write(tile + s * apart, token + m, sum[m][s]);
}

// All tokens of S tiles: for few tokens all tiles at once (memory counts), else fewer tiles and more tokens (registers).
template <typename D, int M, int S, int AT_ONCE> static void some(Weight w, int64_t tile, int64_t apart, const float* x, Output out, int64_t token) {
    constexpr int STEP = S < AT_ONCE ? S : AT_ONCE;
    for (int s = 0; s < S; s += STEP) block<D, M, STEP>(w, tile + s * apart, apart, x + token * w.chunks * CHUNK, out, token);
}
template <typename D, int S> static void tiles(Weight w, int64_t tile, int64_t apart, const float* x, Output out, int64_t tokens) {
    int64_t t = 0;
    for (; MOST >= 8 && tokens - t >= 8; t += 8) some<D, MOST, S, 2>(w, tile, apart, x, out, t);
    for (; tokens - t >= 4; t += 4) some<D, 4, S, 2>(w, tile, apart, x, out, t);
    for (; tokens - t >= 2; t += 2) some<D, 2, S, 4>(w, tile, apart, x, out, t);
    for (; tokens - t >= 1; t += 1) some<D, 1, S, 4>(w, tile, apart, x, out, t);
}

// A 2:4 weight for `many`, whose blocks are those between two flushes.
template <typename D> struct Unfolded {
    Weight w;

    int64_t blocks() const { return (w.chunks + FLUSH - 1) / FLUSH; }
    int chunks(int64_t block) const { return w.chunks - block * FLUSH < FLUSH ? int(w.chunks - block * FLUSH) : FLUSH; }
    int count(int64_t block) const { return chunks(block) * CHUNK / 2; }
    const float* scales(int64_t, int64_t, float*) const { return nullptr; }
    void unfold(int64_t tile, int64_t block, int width, many::Kept& kept) const {
        for (int c = 0; c < chunks(block); c++) {
            const int64_t at = tile * w.chunks + block * FLUSH + c;
            U index = load<U>(w.metadata + at * L);
            prefetch(w.values + at * GROUPS * D::BYTES, GROUPS * D::BYTES);
            for (int g = 0; g < GROUPS; g++) {
                F a, b;
                D::two(w.values + (at * GROUPS + g) * D::BYTES, a, b);
                const int i = c * GROUPS + g;
                many::put(kept, 2 * i, a, index, 4 * i, width);
                many::put(kept, 2 * i + 1, b, index >> 2, 4 * i, width);
                index >>= 4;
            }
        }
    }
};

// Tiles that are read at once lie far apart, so that each is part of a long stream: memory is fetched ahead along these.
template <typename D> static void all(Weight w, const float* x, Output out, int64_t tokens, int64_t threads) {
    constexpr int S = 4;
    const int64_t n = (out.N + L - 1) / L, whole = n / S;
    parallel(whole + n % S, threads, [&](int64_t i) {
        if (i < whole) tiles<D, S>(w, i, whole, x, out, tokens);
        else tiles<D, 1>(w, whole * S + i - whole, 0, x, out, tokens);
    });
}

extern "C" int lanes() { return L; }

// x (tokens, K), y (tokens, N), bias (N) or null: contiguous, of `type`. values, metadata: layout.py. Returns 1 without memory.
extern "C" int linear(const void* x, const uint8_t* values, const uint32_t* metadata, const void* bias, void* y,
                      int64_t tokens, int64_t N, int64_t K, int64_t type, int64_t threads) {
    const Type of = Type(type);
    const Output out{y, bias, N, of};
    const int64_t chunks = (K + CHUNK - 1) / CHUNK, columns = chunks * CHUNK;
#if defined(__AMX_BF16__)
    if (of == BFLOAT16 && tokens > 1) {  // one is faster on vectors
        std::unique_ptr<uint8_t, void (*)(void*)> space(static_cast<uint8_t*>(std::aligned_alloc(64, amx::room_for(tokens, chunks))), std::free);
        if (!space) return 1;
        const amx::Result out{static_cast<uint16_t*>(y), static_cast<const uint16_t*>(bias), N, tokens};
        if (metadata) amx::linear<true>({values, metadata, chunks}, static_cast<const uint16_t*>(x), K, space.get(), out, threads);
        else amx::linear<false>({values, nullptr, chunks}, static_cast<const uint16_t*>(x), K, space.get(), out, threads);
        return 0;
    }
#endif
    const Weight w{values, metadata, chunks};
    if (metadata && tokens >= many::TOKENS) {
        const auto run = [&](auto D) { return !many::linear(Unfolded<decltype(D)>{w}, x, tokens, N, K, of, out, threads); };
        return of == FLOAT32 ? run(Float32{}) : of == BFLOAT16 ? run(BFloat16{}) : run(Float16{});
    }
    std::unique_ptr<float, void (*)(void*)> wide(static_cast<float*>(std::aligned_alloc(64, tokens * columns * 4)), std::free);
    if (!wide) return 1;
    for (int64_t t = 0; t < tokens; t++) widen(x, t, K, columns, of, wide.get() + t * columns);
    if (of == FLOAT32) all<Float32>(w, wide.get(), out, tokens, threads);
    else if (of == BFLOAT16) all<BFloat16>(w, wide.get(), out, tokens, threads);
    else all<Float16>(w, wide.get(), out, tokens, threads);
    return 0;
}

// The dense (N, K) weight of 2:4 tiles, for products with many tokens.
template <typename T, bool PAIRS> static void unpack(Weight w, T* out, int64_t N, int64_t K, int64_t threads) {
    parallel((N + L - 1) / L, threads, [&](int64_t tile) {
        const T* v = reinterpret_cast<const T*>(w.values) + tile * w.chunks * GROUPS * 2 * L;
        const uint32_t* meta = w.metadata + tile * w.chunks * L;
        for (int lane = 0; lane < L && tile * L + lane < N; lane++) {
            T* row = out + (tile * L + lane) * K;
            for (int64_t g = 0; g < K / 4; g++) {
                const uint32_t code = meta[g / GROUPS * L + lane] >> (4 * (g % GROUPS));
                const T* at = v + g * 2 * L;
                T four[4] = {};
                four[code & 3] = at[PAIRS ? 2 * lane : lane];
                four[code >> 2 & 3] = at[PAIRS ? 2 * lane + 1 : L + lane];
                std::memcpy(row + 4 * g, four, sizeof(four));
            }
        }
    });
}
#if defined(__AVX512BW__)
// The same, 32 columns of a tile at once. `chunk` spreads one; a row of it has 64 bytes in each of PARTS.
template <int PARTS, typename Chunk> static void unpack_chunks(Weight w, uint8_t* out, int64_t N, int64_t K, int64_t threads, Chunk chunk) {
    constexpr int64_t WIDE = 64 * PARTS, BYTES = WIDE / CHUNK;  // of a chunk's row; of a number
    parallel((N + L - 1) / L, threads, [&](int64_t tile) {
        alignas(64) uint8_t columns[16 * WIDE], spare[L][WIDE];
        for (int64_t c = 0; c < w.chunks; c++) {
            const int64_t at = tile * w.chunks + c, left = BYTES * (K - c * CHUNK);
            chunk(w.values + at * (WIDE / 2) * L, w.metadata + at * L, columns);
            for (int part = 0; part < PARTS; part++) {
                uint8_t* row[L];
                for (int lane = 0; lane < L; lane++) {
                    const bool whole = tile * L + lane < N && left >= WIDE;
                    row[lane] = 64 * part + (whole ? out + (tile * L + lane) * K * BYTES + c * WIDE : spare[lane]);
                }
                rows_of(columns + 1024 * part, row);
            }
            for (int64_t lane = 0; left < WIDE && lane < L && tile * L + lane < N; lane++)
                std::memcpy(out + (tile * L + lane) * K * BYTES + c * WIDE, spare[lane], left);
        }
    });
}
template <> void unpack<uint16_t, true>(Weight w, uint16_t* out, int64_t N, int64_t K, int64_t threads) {
    unpack_chunks<1>(w, reinterpret_cast<uint8_t*>(out), N, K, threads, unfold<true>);
}
template <> void unpack<uint16_t, false>(Weight w, uint16_t* out, int64_t N, int64_t K, int64_t threads) {
    unpack_chunks<1>(w, reinterpret_cast<uint8_t*>(out), N, K, threads, unfold<false>);
}
template <> void unpack<uint32_t, false>(Weight w, uint32_t* out, int64_t N, int64_t K, int64_t threads) {
    unpack_chunks<2>(w, reinterpret_cast<uint8_t*>(out), N, K, threads, unfold_floats);
}
#endif
// pairs: the order of the values, which need not be the one that `linear` reads for this type
extern "C" void expand(const uint8_t* values, const uint32_t* metadata, void* out, int64_t N, int64_t K, int64_t type,
                       int64_t pairs, int64_t threads) {
    const Weight w{values, metadata, (K + CHUNK - 1) / CHUNK};
    if (bytes_of(Type(type)) == 4) {
        if (pairs) unpack<uint32_t, true>(w, static_cast<uint32_t*>(out), N, K, threads);
        else unpack<uint32_t, false>(w, static_cast<uint32_t*>(out), N, K, threads);
    } else {
        if (pairs) unpack<uint16_t, true>(w, static_cast<uint16_t*>(out), N, K, threads);
        else unpack<uint16_t, false>(w, static_cast<uint16_t*>(out), N, K, threads);
    }
}
