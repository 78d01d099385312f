// One vector of L rows: AVX-512, AVX2 or NEON, chosen by compiler flags. What GCC's and Clang's vector types can do by
// themselves is written with operators; the rest is here.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR = 64;
#elif defined(__AVX2__)
constexpr int VECTOR = 32;
#else
constexpr int VECTOR = 16;
#endif
constexpr int L = VECTOR / 4;  // rows (float lanes)
typedef float F __attribute__((vector_size(VECTOR)));
typedef uint32_t U __attribute__((vector_size(VECTOR)));
typedef int32_t I __attribute__((vector_size(VECTOR)));

template <typename V> static inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }

// four floats, once for every four lanes
static inline F broadcast4(const float* p) {
#if defined(__AVX512F__)
    return F(_mm512_broadcast_f32x4(_mm_loadu_ps(p)));
#elif defined(__AVX2__)
    return F(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
#else
    return load<F>(p);
#endif
}

// lane by lane one of the four floats of `broadcast4`, by the low two bits of i
static inline F pick(F x, U i) {
#if defined(__AVX512F__)
    return F(_mm512_permutevar_ps(__m512(x), __m512i(i)));
#elif defined(__AVX2__)
    return F(_mm256_permutevar_ps(__m256(x), __m256i(i)));
#elif defined(__aarch64__)
    U bytes = (i & 3) * 0x04040404u + 0x03020100u;
    return F(vqtbl1q_u8(uint8x16_t(x), uint8x16_t(bytes)));
#else
#error "no such processor yet"
#endif
}

// L consecutive fp16 numbers
static inline F load_half(const void* p) {
#if defined(__AVX512F__)
    return F(_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return F(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
    return F(vcvt_f32_f16(load<float16x4_t>(p)));
#endif
}

// One number from and to the types of tensors: 0 float32, 1 bfloat16, 2 float16. Rounds to nearest, ties to even.
enum Type { FLOAT32, BFLOAT16, FLOAT16 };
static inline int bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }

static inline float half_to_float(uint16_t h) {
#if defined(__x86_64__)
    return _cvtsh_ss(h);
#else
    __fp16 value; std::memcpy(&value, &h, 2); return value;
#endif
}
static inline uint16_t float_to_half(float f) {
#if defined(__x86_64__)
    return _cvtss_sh(f, 0);
#else
    __fp16 value = __fp16(f); uint16_t h; std::memcpy(&h, &value, 2); return h;
#endif
}
static inline float bf16_to_float(uint16_t b) { uint32_t u = uint32_t(b) << 16; float f; std::memcpy(&f, &u, 4); return f; }
static inline uint16_t float_to_bf16(float f) {
    uint32_t u; std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float get(const void* p, int64_t i, Type type) {
    if (type == FLOAT32) return static_cast<const float*>(p)[i];
    uint16_t h = static_cast<const uint16_t*>(p)[i];
    return type == BFLOAT16 ? bf16_to_float(h) : half_to_float(h);
}
static inline void put(void* p, int64_t i, Type type, float f) {
    if (type == FLOAT32) static_cast<float*>(p)[i] = f;
    else static_cast<uint16_t*>(p)[i] = type == BFLOAT16 ? float_to_bf16(f) : float_to_half(f);
}
