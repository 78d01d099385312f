// Products of bfloat16 with many tokens on the tile registers: a weight is unfolded once for BATCH tokens.
//
// What is used again stays in the caches: a panel of x (PANEL chunks of columns of all tokens of a batch, 512 KB) serves all
// tiles of an item, two after the other; their panel, 32 KB unfolded, serves all tokens, 32 at a time. Between two panels sums
// lie in memory. A token's products are added up in order, one by one, as amx_floats.h does it.
#pragma once
#if defined(__AMX_BF16__)
#include "amx.h"

namespace amx {

constexpr int CHUNK = 32;  // columns that fill a register
constexpr int PANEL = 16, BATCH = 512, TILES = 32;  // chunks of a panel; tokens of a batch; tiles of an item, at most

struct Result { uint16_t* y; const uint16_t* bias; int64_t N, tokens; };

// A chunk of a row of x, which has `left` columns from here on (or none); zeros behind them.
ALWAYS void copy_chunk(const uint16_t* x, int64_t left, uint8_t* to) {
    if (left >= CHUNK) { std::memcpy(to, x, 2 * CHUNK); return; }
    const int64_t columns = left > 0 ? left : 0;
    std::memcpy(to, x, 2 * columns);
    std::memset(to + 2 * columns, 0, 2 * (CHUNK - columns));
}

// A tile's 16 rows of y for a token, those below N.
ALWAYS void write_rows(F sum, int64_t tile, int64_t token, const Result& out) {
    put_lanes(out.y, token * out.N + tile * ROWS, out.N - tile * ROWS, BFLOAT16, sum);
}
ALWAYS F bias_of(const Result& out, int64_t tile) {
    return out.bias ? get_lanes(out.bias, tile * ROWS, out.N - tile * ROWS, BFLOAT16) : F{};
}

// Sums of an item and a batch, register by register: 1 MB a thread, kept from call to call.
struct Sums { alignas(64) float of[TILES][BATCH / ROWS][ROWS][ROWS]; };
static Sums& own_sums() { static thread_local Sums sums; return sums; }

// Add `chunks` chunks of S tiles, the first of them `tile`, and T times 16 tokens, `t` the first; first: to zero.
template <int S, int T> static void add(const uint8_t* const (&b)[S], const uint8_t* x, int64_t chunks, bool first, Sums& sum, int64_t tile, int64_t t) {
#pragma GCC unroll 4
    for (int i = 0; i < S * T; i++) {
        if (first) zero(i);
        else fetch(i, reinterpret_cast<uint8_t*>(sum.of[tile + i / T][t + i % T]));
    }
    for (int64_t c = 0; c < chunks; c++) {
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) fetch(6 + s, b[s] + c * TILE);
#pragma GCC unroll 2
        for (int i = 0; i < T; i++) {
            fetch(4 + i, x + ((t + i) * PANEL + c) * TILE);
#pragma GCC unroll 2
            for (int s = 0; s < S; s++) multiply<false>(s * T + i, 4 + i, 6 + s);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < S * T; i++) keep(i, sum.of[tile + i / T][t + i % T]);
}

// One panel of S tiles of a weight, the `tile`-th of an item that begins with the `from`-th, for all tokens.
template <int S, typename W> static void add_panel(const W& w, int64_t from, int64_t tile, const uint8_t* x, int64_t first, int64_t chunks, int64_t tokens, Sums& sum) {
    alignas(64) uint8_t unfolded[S][PANEL * TILE];
    const uint8_t* b[S];
    for (int s = 0; s < S; s++) b[s] = w.in_registers(from + tile + s, first, chunks, unfolded[s]);
    int64_t t = 0;
    for (; t + 1 < tokens; t += 2) add<S, 2>(b, x, chunks, first == 0, sum, tile, t);
    if (t < tokens) add<S, 1>(b, x, chunks, first == 0, sum, tile, t);
}

// Bytes of x in the order of `many`, at most BATCH tokens of it: (panel, token tile, PANEL, 16, 64 bytes).
static inline int64_t room_for_many(int64_t tokens, int64_t chunks) {
    return room(tokens < BATCH ? tokens : BATCH, (chunks + PANEL - 1) / PANEL * PANEL);
}

// y = x Wᵀ + bias. x: (tokens, K), K > 0. space: room_for_many(tokens, w.chunks) bytes, on 64. W has `chunks`, `scale(tile)`,
// which the sums of its rows are multiplied by, and `in_registers(tile, first, chunks, buffer)`, which says where these chunks
// of a tile lie as registers hold them: in the weight, or unfolded into the buffer.
template <typename W> static void many(const W& w, const uint16_t* x, int64_t K, uint8_t* space, const Result& out, int64_t threads) {
    if (out.N == 0) return;
    const Shape shape = shape_for(ROWS);
    const int64_t n = (out.N + ROWS - 1) / ROWS, parts = (n + TILES * threads - 1) / (TILES * threads) * threads;
    const int64_t each = (n + 2 * parts - 1) / (2 * parts) * 2;  // tiles of an item, in pairs
    for (int64_t begin = 0; begin < out.tokens; begin += BATCH) {
        const int64_t end = begin + BATCH < out.tokens ? begin + BATCH : out.tokens, tiles = (end - begin + ROWS - 1) / ROWS;
        parallel(tiles, threads, [&](int64_t t) {
            for (int64_t m = begin + t * ROWS; m < end && m < begin + (t + 1) * ROWS; m++)
                for (int64_t c = 0; c < w.chunks; c++)
                    copy_chunk(x + m * K + c * CHUNK, K - c * CHUNK, space + (((c / PANEL * tiles + t) * PANEL + c % PANEL) * ROWS + (m - begin) % ROWS) * 64);
        });
        parallel((n + each - 1) / each, threads, [&](int64_t item) {
            Sums& sum = own_sums();
            const Registers used(shape);
            const int64_t from = item * each, count = from + each < n ? each : n - from;
            for (int64_t c = 0; c < w.chunks; c += PANEL) {
                const int64_t chunks = w.chunks - c < PANEL ? w.chunks - c : PANEL;
                const uint8_t* at = space + c * tiles * TILE;
                int64_t tile = 0;
                for (; tile + 1 < count; tile += 2) add_panel<2>(w, from, tile, at, c, chunks, tiles, sum);
                if (tile < count) add_panel<1>(w, from, tile, at, c, chunks, tiles, sum);
            }
            F bias[TILES], scale[TILES];
            for (int64_t tile = 0; tile < count; tile++) { bias[tile] = bias_of(out, from + tile); scale[tile] = w.scale(from + tile); }
            for (int64_t m = begin; m < end; m++) for (int64_t tile = 0; tile < count; tile++) {
                const F own = load<F>(sum.of[tile][(m - begin) / ROWS][(m - begin) % ROWS]);
                write_rows(add_product(bias[tile], own, scale[tile]), from + tile, m, out);
            }
        });
    }
}

}  // namespace amx
#endif
