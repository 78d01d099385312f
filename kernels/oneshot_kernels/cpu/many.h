// y = x Wᵀ for many tokens and a 2:4 weight, with tokens on SIMD lanes.
//
// A kept weight is broadcast and multiplies its column of x, for MOST vectors of tokens at once. Nothing has to be picked: which
// column it is, is an address. So a 2:4 weight takes half of a dense one's multiplications, and is faster than a dense product
// can be. (Elsen et al., Fast Sparse ConvNets, arXiv 1911.09723, do so for convolutions.) A block of columns of x, of a panel of
// tokens, stays in the nearest cache, and a tile's part of the weight is unfolded once for it.
//
// A sum takes its products in the order of the kernels for few tokens, so a token's bits do not depend on how many there are.
#pragma once
#include <cstdlib>
#include <memory>
#include <unistd.h>
#include "parallel.h"
#include "unfold.h"
#include "vectors.h"

namespace many {

constexpr int COLUMNS = 64, KEPT = COLUMNS / 2;            // of a block
constexpr int LEAST = 3, MOST = 8;                         // vectors of tokens of a panel
constexpr int64_t TOKENS = LEAST * L;                      // from which on this is faster
constexpr int TILES = 256 / L;                             // tiles of an item, at most

// A block of a tile: its kept weights, and where the columns of x that they multiply begin in the block's panel, in bytes.
struct Kept { alignas(64) float weight[KEPT][L]; alignas(64) int32_t at[KEPT][L]; };

// The i-th kept weights of a tile, which are of column `first` + the low two bits of `position`. width: bytes of a column of x.
ALWAYS void put(Kept& kept, int i, F weight, U position, int first, int width) {
    const U at = ((position & 3) + first) * width;
    std::memcpy(kept.weight[i], &weight, VECTOR);
    std::memcpy(kept.at[i], &at, VECTOR);
}

// Add a block's products, `count` for each row, to a tile's sums (V, L) of L tokens each. scale: of each row, or null.
template <int V> static void add(const uint8_t* x, const Kept& kept, int count, const float* scale, F* sum) {
    constexpr int R = V > 6 ? 1 : V > 3 ? 2 : 4;  // rows at once: their sums fill the registers
    for (int row = 0; row < L; row += R) {
        F acc[R][V] = {};
        for (int i = 0; i < count; i++) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const uint8_t* column = x + kept.at[i][row + r];
                const F weight = kept.weight[i][row + r] - F{};  // of F{} + it an addition would be left
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) acc[r][v] += load<F>(column + v * VECTOR) * weight;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const F own = F{} + (scale ? scale[row + r] : 1);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[v * L + row + r] = add_product(sum[v * L + row + r], acc[r][v], own);
        }
    }
}

// L vectors, one after the other, with rows and columns exchanged.
static inline void transpose(const uint8_t* from, uint8_t* const (&row)[L]) {
#if defined(__AVX512BW__)
    rows_of(from, row);
#else
    for (int r = 0; r < L; r++) for (int c = 0; c < L; c++) std::memcpy(row[r] + 4 * c, from + c * VECTOR + 4 * r, 4);
#endif
}

// L tokens of x (tokens, K) from `first` on, as columns: L floats every `width` bytes of `out`. Zeros behind x.
static void turn(const void* x, int64_t tokens, int64_t K, int64_t columns, Type type, int64_t first, int64_t width, uint8_t* out) {
    for (int64_t k = 0; k < columns; k += L) {
        alignas(64) uint8_t part[L * VECTOR];
        uint8_t* column[L];
        for (int l = 0; l < L; l++) {
            const F own = first + l < tokens ? get_lanes(x, (first + l) * K + k, K - k, type) : F{};
            std::memcpy(part + l * VECTOR, &own, VECTOR);
            column[l] = out + (k + l) * width;
        }
        transpose(part, column);
    }
}

// W: blocks(), count(block): kept weights of each row, scales(tile, block, buffer): pointer or null, and
// unfold(tile, block, width, kept). out: write(tile, token, sums of its rows).
template <int V, typename W, typename Out> static void item(const W& w, const uint8_t* x, int64_t tile, int64_t tiles, int64_t token, int64_t tokens, const Out& out, F* sum) {
    std::memset(static_cast<void*>(sum), 0, tiles * V * L * VECTOR);
    Kept kept;
    float buffer[L];
    for (int64_t b = 0; b < w.blocks(); b++) for (int64_t t = 0; t < tiles; t++) {
        w.unfold(tile + t, b, V * VECTOR, kept);
        add<V>(x + b * COLUMNS * V * VECTOR, kept, w.count(b), w.scales(tile + t, b, buffer), sum + t * V * L);
    }
    for (int v = 0; v < V; v++) for (int64_t t = 0; t < tiles; t++) {
        alignas(64) uint8_t rows[L][VECTOR];
        uint8_t* row[L];
        for (int l = 0; l < L; l++) row[l] = rows[l];
        transpose(reinterpret_cast<const uint8_t*>(sum + (t * V + v) * L), row);
        for (int l = 0; l < L && token + v * L + l < tokens; l++) out.write(tile + t, token + v * L + l, load<F>(rows[l]));
    }
}

// Vectors of tokens of a panel, at most: a block of it takes three quarters of the nearest cache. 2 LEAST: so that panels of
// equal size have LEAST.
static int64_t most() {
    long bytes = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    const int64_t room = (bytes > 0 ? bytes : 32 << 10) * 3 / 4 / (COLUMNS * VECTOR);
    return room < 2 * LEAST ? 2 * LEAST : room < MOST ? room : MOST;
}

// x (tokens, K) of `type`, TOKENS at least. Returns whether there was memory.
template <typename W, typename Out> static bool linear(const W& w, const void* x, int64_t tokens, int64_t N, int64_t K, Type type, const Out& out, int64_t threads) {
    if (N == 0) return true;
    const int64_t vectors = (tokens + L - 1) / L, fit = most(), panels = (vectors + fit - 1) / fit, columns = w.blocks() * COLUMNS;
    const int64_t tiles = (N + L - 1) / L, parts = (tiles + TILES * threads - 1) / (TILES * threads) * threads, each = (tiles + parts - 1) / parts;
    const int64_t items = (tiles + each - 1) / each;
    const auto begin = [&](int64_t panel) { return panel * vectors / panels; };  // its first vector of tokens
    std::unique_ptr<uint8_t, void (*)(void*)> turned(static_cast<uint8_t*>(std::aligned_alloc(64, vectors * columns * VECTOR)), std::free);
    if (!turned) return false;
    parallel(panels, threads, [&](int64_t panel) {
        const int64_t first = begin(panel), width = begin(panel + 1) - first;
        for (int64_t v = 0; v < width; v++)
            turn(x, tokens, K, columns, type, (first + v) * L, width * VECTOR, turned.get() + (first * columns + v) * VECTOR);
    });
    parallel(panels * items, threads, [&](int64_t i) {
        struct Sums { F of[TILES * MOST * L]; };
        static thread_local Sums sums;  // kept from call to call
        constexpr void (*OF[])(const W&, const uint8_t*, int64_t, int64_t, int64_t, int64_t, const Out&, F*) = {
            item<LEAST, W, Out>, item<4, W, Out>, item<5, W, Out>, item<6, W, Out>, item<7, W, Out>, item<MOST, W, Out>};
        const int64_t panel = i / items, first = begin(panel), tile = i % items * each, count = tile + each < tiles ? each : tiles - tile;
        OF[begin(panel + 1) - first - LEAST](w, turned.get() + first * columns * VECTOR, tile, count, first * L, tokens, out, sums.of);
    });
    return true;
}

}  // namespace many
