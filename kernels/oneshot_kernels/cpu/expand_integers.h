// Integer weights for products with many tokens: a block at a time for many.h, or as dense numbers; after integers.cpp's own parts.
#pragma once

// A 2:4 weight for `many`, which leaves x as it is.
template <bool FOUR> struct Unfolded {
    Weight w;

    int64_t blocks() const { return w.blocks; }
    int count(int64_t) const { return BLOCK / 2; }
    const float* scales(int64_t tile, int64_t block, float* buffer) const {
        if (!FOUR) return nullptr;
        const F own = load_half(static_cast<const uint16_t*>(w.scale) + (tile * w.blocks + block) * L);
        std::memcpy(buffer, &own, sizeof(own));
        return buffer;
    }
    void unfold(int64_t tile, int64_t block, int width, many::Kept& kept) const {
        for (int half = 0; half < 2; half++) {
            const uint8_t* at = w.values + ((tile * w.blocks + block) * 2 + half) * HALF<FOUR>;
            const U word = load<U>(at);
            for (int step = 0; step < 4; step++) {
                const U four = weights<FOUR>(at + VECTOR, step);
                for (int j = 0; j < 4; j++)  // kept weight j % 2 of group j / 2
                    many::put(kept, 16 * half + 4 * step + j, weight(four, j), word >> (8 * j + 2 * step), 32 * half + 8 * step + 4 * (j / 2), width);
            }
        }
    }
};
template <bool FOUR> struct Rows {  // of y, for `many`
    Weight w; Output out;
    void write(int64_t tile, int64_t token, F sum) const { put_rows<FOUR>(w, out, tile, token, sum); }
};

// A block of columns of a tile, row by row.
template <bool FOUR> static void codes_by_row(Weight w, int64_t tile, int64_t b, int8_t (&out)[L][BLOCK]) {
    typedef int8_t Bytes4[L][4];
    Bytes4 codes, index;
    if (!w.sparse) {
        const uint8_t* v = w.values + (tile * w.blocks + b) * BLOCK * L / (FOUR ? 2 : 1);
        for (int step = 0; step < BLOCK / 4; step++) {
            const U four = weights<FOUR>(v, step);
            std::memcpy(codes, &four, VECTOR);
            for (int lane = 0; lane < L; lane++) std::memcpy(out[lane] + 4 * step, codes[lane], 4);
        }
        return;
    }
    std::memset(out, 0, sizeof(out));
    for (int half = 0; half < 2; half++) {
        const uint8_t* v = w.values + ((tile * w.blocks + b) * 2 + half) * HALF<FOUR>;
        std::memcpy(index, v, VECTOR);
        for (int step = 0; step < 4; step++) {
            const U kept = weights<FOUR>(v + VECTOR, step);
            std::memcpy(codes, &kept, VECTOR);
            for (int lane = 0; lane < L; lane++) for (int j = 0; j < 4; j++)  // kept weight j % 2 of group j / 2
                out[lane][32 * half + 8 * step + 4 * (j / 2) + (uint8_t(index[lane][j]) >> (2 * step) & 3)] = codes[lane][j];
        }
    }
}

// The first N rows of a weight, (N, K) of `type`: scale times code, for products with many tokens.
extern "C" void expand_integers(const uint8_t* values, const void* scale, void* out, int64_t N, int64_t K, int64_t type, int64_t bits,
                                int64_t sparse, int64_t threads) {
    const Weight w{values, scale, (K + BLOCK - 1) / BLOCK, sparse != 0};
    parallel((N + L - 1) / L, threads, [&](int64_t tile) {
        for (int64_t b = 0; b < w.blocks; b++) {
            int8_t codes[L][BLOCK];
            if (bits == 4) codes_by_row<true>(w, tile, b, codes);
            else codes_by_row<false>(w, tile, b, codes);
            const int64_t columns = K - b * BLOCK < BLOCK ? K - b * BLOCK : BLOCK;
            for (int64_t lane = 0; lane < L && tile * L + lane < N; lane++) {
                const int64_t row = tile * L + lane;
                const float own = bits == 4 ? half_to_float(static_cast<const uint16_t*>(scale)[(tile * w.blocks + b) * L + lane])
                                            : static_cast<const float*>(scale)[row];
                for (int64_t c = 0; c < columns; c++) put(out, row * K + b * BLOCK + c, Type(type), codes[lane][c] * own);
            }
        }
    });
}
