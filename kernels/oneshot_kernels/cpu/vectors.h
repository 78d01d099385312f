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

#define ALWAYS static inline __attribute__((always_inline))  // for inner loops: 2:4 with 16 tokens is a quarter slower without

template <typename V> static inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }

// Load the part of a stream into the cache that is AHEAD bytes behind this one: several streams, and work between two loads,
// keep the processor from looking that far by itself (2:4 int4 a sixth faster, dense bfloat16 a tenth, results/LOG.md).
constexpr int AHEAD = 3072;
ALWAYS void prefetch(const uint8_t* part, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(part + AHEAD + i);
}

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

// sum + a b, rounded once, wherever it stands: of `sum += a * b` a compiler decides in each place anew
static inline F add_product(F sum, F a, F b) {
#if defined(__AVX512F__)
    return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(sum)));
#elif defined(__AVX2__)
    return F(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(sum)));
#else
    return F(vfmaq_f32(float32x4_t(sum), float32x4_t(a), float32x4_t(b)));
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

// Four signed bytes a lane: acc + Σ w · x. With VNNI one operand has to be unsigned: there x comes with OFFSET added, and
// `excess`, to be subtracted in the end, gathers what that adds. Elsewhere OFFSET is 0.
#if defined(__AVX512VNNI__)
constexpr int OFFSET = 128;
#else
constexpr int OFFSET = 0;
#endif
static inline I dot4(I acc, U w, U x) {
#if defined(__AVX512VNNI__)
    return I(_mm512_dpbusd_epi32(__m512i(acc), __m512i(x), __m512i(w)));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(__m256i(w)), _mm256_sign_epi8(__m256i(x), __m256i(w)));
    return acc + I(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    const int8x16_t a = int8x16_t(w), b = int8x16_t(x);
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
    return I(vpadalq_s16(int32x4_t(acc), vpaddq_s16(low, high)));
#endif
}
static inline I excess(I acc, U w) { return OFFSET ? dot4(acc, w, U{} + 0x80808080u) : acc; }

// eight bytes, once for every two lanes
static inline U broadcast8(const uint8_t* p) {
    uint64_t v; std::memcpy(&v, p, 8);
    typedef uint64_t W __attribute__((vector_size(VECTOR)));
    return U(W{} + v);
}

// byte by byte one of the eight bytes of `broadcast8`, by the index in each byte of i (0 to 7)
static inline U pick_bytes(U x, U i) {
#if defined(__AVX512F__)
    return U(_mm512_shuffle_epi8(__m512i(x), __m512i(i)));
#elif defined(__AVX2__)
    return U(_mm256_shuffle_epi8(__m256i(x), __m256i(i)));
#else
    return U(vqtbl1q_u8(uint8x16_t(x), uint8x16_t(i)));
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

// Row t of x (.., K) as `columns` floats, zeros behind K.
static inline void widen(const void* x, int64_t t, int64_t K, int64_t columns, Type type, float* out) {
    const uint16_t* halves = static_cast<const uint16_t*>(x) + t * K;
    if (type == FLOAT32) std::memcpy(out, static_cast<const float*>(x) + t * K, K * 4);
    else if (type == BFLOAT16) for (int64_t k = 0; k < K; k++) out[k] = bf16_to_float(halves[k]);
    else for (int64_t k = 0; k < K; k++) out[k] = half_to_float(halves[k]);
    std::memset(out + K, 0, (columns - K) * 4);
}

// As bfloat16, in the lower halves. rounded_number: of what is no NaN; rounded: of any, NaN stays NaN.
ALWAYS U rounded_number(F v) { return (U(v) + 0x7fff + (U(v) >> 16 & 1)) >> 16; }
ALWAYS U rounded(F v) {
    const U nan = U((U(v) & 0x7fffffff) > 0x7f800000u);
    return (nan & (U(v) >> 16 | 0x40)) | (~nan & rounded_number(v));
}

// L consecutive bfloat16 numbers
typedef uint16_t Halves __attribute__((vector_size(VECTOR / 2)));
static inline F load_bf16(const void* p) { return F(__builtin_convertvector(load<Halves>(p), U) << 16); }

// L numbers of an array from the i-th on, of which `left` are there; zeros in the place of the others.
static inline F get_lanes(const void* p, int64_t i, int64_t left, Type type) {
    F v = {};
    if (left < L) {
        for (int64_t l = 0; l < left; l++) v[l] = get(p, i + l, type);
        return v;
    }
    const uint8_t* at = static_cast<const uint8_t*>(p) + i * bytes_of(type);
    if (type == FLOAT32) return load<F>(at);
    return type == BFLOAT16 ? load_bf16(at) : load_half(at);
}
static inline void put_lanes(void* p, int64_t i, int64_t left, Type type, F v) {
    if (left < L || type == FLOAT16) {
        for (int64_t l = 0; l < left && l < L; l++) put(p, i + l, type, v[l]);
    } else if (type == FLOAT32) {
        std::memcpy(static_cast<float*>(p) + i, &v, sizeof(v));
    } else {
        const Halves halves = __builtin_convertvector(rounded(v), Halves);
        std::memcpy(static_cast<uint16_t*>(p) + i, &halves, sizeof(halves));
    }
}
