// A chunk of a 2:4 weight, 32 columns of 16 rows, as a dense one: AVX-512.
//
// 16 bits: each group's vector of kept pairs (layout.py) is spread over two vectors, its first and its last two columns, by bytes that
// a table of 16 entries gives for the group's four bits.
#pragma once
#if defined(__AVX512BW__)
#include "vectors.h"

// Where the four bytes of a lane's two columns come from, for each four bits (two positions of two bits, the first lower):
// bytes 0 and 1 are the first kept value, 2 and 3 the second; 0x80 gives zero.
struct Spread {
    alignas(64) uint32_t half[2][16];
    Spread() {
        for (int code = 0; code < 16; code++) for (int h = 0; h < 2; h++) {
            uint32_t bytes = 0x80808080u;
            const int at[2] = {code & 3, code >> 2};
            for (int kept = 0; kept < 2; kept++) if (at[kept] / 2 == h) {
                const int shift = 16 * (at[kept] % 2);
                bytes = (bytes & ~(0xffffu << shift)) | (kept ? 0x0302u : 0x0100u) << shift;
            }
            half[h][code] = bytes;
        }
    }
};
static const Spread spread;

// values: 8 groups of 16 pairs, or of 16 first and 16 second values. metadata: a word a row. out: 16 pairs of columns, of
// each the 16 rows; 1024 bytes, on 64.
template <bool PAIRS = true> static inline void unfold(const uint8_t* values, const uint32_t* metadata, uint8_t* out) {
    const __m512i first = _mm512_load_si512(spread.half[0]), second = _mm512_load_si512(spread.half[1]);
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // a shuffle is among 16 bytes
    __m512i code = _mm512_loadu_si512(metadata);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        __m512i kept = _mm512_loadu_si512(values + 64 * g);
        if (!PAIRS) kept = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(kept)),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(kept, 1)), 16));
        const __m512i low = _mm512_or_si512(_mm512_permutexvar_epi32(code, first), lane);
        const __m512i high = _mm512_or_si512(_mm512_permutexvar_epi32(code, second), lane);
        _mm512_store_si512(out + 128 * g, _mm512_shuffle_epi8(kept, low));
        _mm512_store_si512(out + 128 * g + 64, _mm512_shuffle_epi8(kept, high));
        code = _mm512_srli_epi32(code, 4);
    }
}

// The same for 32 bits. values: 8 groups of 16 first and 16 second values. out: 32 columns of 16 rows; 2048 bytes, on 64.
static inline void unfold_floats(const uint8_t* values, const uint32_t* metadata, uint8_t* out) {
    __m512i code = _mm512_loadu_si512(metadata);
    const __m512i two = _mm512_set1_epi32(3);
    for (int g = 0; g < 8; g++) {
        const __m512i first = _mm512_loadu_si512(values + 128 * g), second = _mm512_loadu_si512(values + 128 * g + 64);
        const __m512i i = _mm512_and_si512(code, two), j = _mm512_and_si512(_mm512_srli_epi32(code, 2), two);
#pragma GCC unroll 4
        for (int column = 0; column < 4; column++) {
            const __m512i at = _mm512_set1_epi32(column);
            const __m512i kept = _mm512_maskz_mov_epi32(_mm512_cmpeq_epi32_mask(i, at), first);
            _mm512_store_si512(out + 256 * g + 64 * column, _mm512_mask_mov_epi32(kept, _mm512_cmpeq_epi32_mask(j, at), second));
        }
        code = _mm512_srli_epi32(code, 4);
    }
}

// From pairs of columns of 16 bits, or columns of 32, each with its 16 rows, to rows of 64 bytes.
static inline void rows_of(const uint8_t* pairs, uint8_t* const (&row)[16]) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(pairs + 64 * i);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) { b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]); b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]); }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]); a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]); a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {  // of four neighbours: lanes 0 and 2 of a row, lanes 1 and 3
        const int j = i / 4 * 8 + i % 4;
        b[j] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88); b[j + 4] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(row[i], _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(row[i + 8], _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}
#endif
