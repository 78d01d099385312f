// A chunk of a 2:4 weight in bfloat16 or float16, 32 columns of 16 rows, as a dense one: AVX-512.
//
// Each group's vector of kept pairs (layout.py) is spread over two vectors, its first and its last two columns, by bytes that
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

// values: 8 groups of 16 pairs. metadata: a word a row. out: 16 pairs of columns, of each the 16 rows; 1024 bytes, on 64.
static inline void unfold(const uint8_t* values, const uint32_t* metadata, uint8_t* out) {
    const __m512i first = _mm512_load_si512(spread.half[0]), second = _mm512_load_si512(spread.half[1]);
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // a shuffle is among 16 bytes
    __m512i code = _mm512_loadu_si512(metadata);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        const __m512i kept = _mm512_loadu_si512(values + 64 * g);
        const __m512i low = _mm512_or_si512(_mm512_permutexvar_epi32(code, first), lane);
        const __m512i high = _mm512_or_si512(_mm512_permutexvar_epi32(code, second), lane);
        _mm512_store_si512(out + 128 * g, _mm512_shuffle_epi8(kept, low));
        _mm512_store_si512(out + 128 * g + 64, _mm512_shuffle_epi8(kept, high));
        code = _mm512_srli_epi32(code, 4);
    }
}

// From pairs of columns, each with its 16 rows, to rows of 64 bytes.
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
