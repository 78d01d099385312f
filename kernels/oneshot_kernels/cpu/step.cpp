// One token through a Llama-like model: norms, rotary positions, attention over the cache, gated MLP, output head. What
// Python does in some hundred small operations is one call here; the products are those of linear.cpp and integers.cpp,
// whose functions are handed over, and `rows` for weights that lie row by row as torch has them.
//
// Numbers are float32 inside each operation and rounded to the model's type wherever transformers rounds them (`near`), so
// that inputs which are rounded to int8 afterwards mostly get the same codes.
#include <cmath>
#include <cstdlib>
#include <memory>
#include "parallel.h"
#include "step.h"
#include "vectors.h"

constexpr int AT_ONCE = 4;   // rows read at once: one address stream does not reach the memory's speed
constexpr int PIECE = 8;     // rows that a thread takes at a time from each stream

static inline float total(F v) {
    float lanes[L];
    std::memcpy(lanes, &v, sizeof(v));
    for (int half = L / 2; half; half /= 2)  // as a tree: one after the other they would wait for each other
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
static inline void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }

// exp(x), to 2 in the last place: 2^n times a polynomial (Cephes); 0 below the smallest normal number.
static inline F exponential(F x) {
    const F low = F{} - 87.3f, high = F{} + 88.3f;
    const I tiny = x < low;
    x = x < low ? low : x > high ? high : x;  // a NaN passes both
    const F scaled = x * 1.44269504f;
    const I n = __builtin_convertvector(scaled + (scaled < 0 ? F{} - 0.5f : F{} + 0.5f), I);
    const F whole = __builtin_convertvector(n, F);
    const F r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    F p = F{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const F result = (p * r * r + r + 1.0f) * F((n + 127) << 23);
    return tiny ? F{} : result;
}

struct As32 { static constexpr int BYTES = 4; static F get(const uint8_t* p) { return load<F>(p); } };
struct As16 { static constexpr int BYTES = 2; static F get(const uint8_t* p) { return load_half(p); } };
struct AsB16 { static constexpr int BYTES = 2; static F get(const uint8_t* p) { return load_bf16(p); } };

// y = W x + bias for a weight (N, K) row by row: R rows at once, each `apart` rows from the one before it, so that each is a
// stream of its own through a part of the memory.
template <typename D, int R> static inline void some_rows(const Linear& w, const float* x, void* y, int64_t row, int64_t apart, Type type) {
    const uint8_t* at[R];
    for (int r = 0; r < R; r++) at[r] = w.values + (row + r * apart) * w.K * D::BYTES;
    F acc[R] = {};
    int64_t k = 0;
    for (; k + L <= w.K; k += L) {
        const F part = load<F>(x + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r] += D::get(at[r] + k * D::BYTES) * part;
    }
    for (int r = 0; r < R; r++) {
        float sum = total(acc[r]);
        for (int64_t tail = k; tail < w.K; tail++) sum += get(at[r], tail, type) * x[tail];
        put(y, row + r * apart, type, sum + (w.bias ? get(w.bias, row + r * apart, type) : 0));
    }
}
template <typename D> static void all_rows(const Linear& w, const float* x, void* y, Type type, int64_t threads) {
    const int64_t part = w.N / AT_ONCE, left = w.N % AT_ONCE, pieces = (part + PIECE - 1) / PIECE;
    parallel(pieces + (left > 0), threads, [&](int64_t i) {
        if (i == pieces) for (int64_t row = w.N - left; row < w.N; row++) some_rows<D, 1>(w, x, y, row, 0, type);
        else for (int64_t row = i * PIECE; row < (i + 1) * PIECE && row < part; row++) some_rows<D, AT_ONCE>(w, x, y, row, part, type);
    });
}

// Memory that one token needs.
struct Room {
    Type type;
    std::unique_ptr<uint8_t, void (*)(void*)> bytes;
    uint8_t *x, *normed, *wide, *mixed;  // in the model's type
    float *plain, *scores;               // float32
    static int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }
    Room(const Model& m, int64_t positions) : type(Type(m.type)), bytes(nullptr, std::free) {
        const int64_t qkv = (m.heads + 2 * m.kv_heads) * m.head_dim, most = qkv > 2 * m.mlp ? qkv : 2 * m.mlp;
        const int64_t widest = padded(most > m.hidden ? most : m.hidden), group = m.heads / m.kv_heads;
        const int64_t scores = m.kv_heads * (group * (padded(positions) + 2 * padded(m.head_dim)) + padded(m.head_dim));
        bytes.reset(static_cast<uint8_t*>(std::aligned_alloc(64, 4 * (5 * widest + scores))));
        x = bytes.get(), normed = x + 4 * widest, wide = normed + 4 * widest, mixed = wide + 4 * widest;
        plain = reinterpret_cast<float*>(mixed + 4 * widest), this->scores = plain + widest;
    }
};

static int product(const Model& m, const Linear& w, const void* x, void* y, Room& room) {
    const int64_t threads = w.N * w.K >= 1 << 15 ? m.threads : 1;
    if (w.form == 1) return m.floats(x, w.values, w.indices, w.bias, y, 1, w.N, w.K, m.type, threads);
    if (w.form) return m.integers(x, w.values, w.scale, w.bias, y, 1, w.N, w.K, m.type, w.form & 15, w.form >> 4 & 1, w.form >> 5, threads);
    widen(x, 0, w.K, w.K, room.type, room.plain);
    if (room.type == FLOAT32) all_rows<As32>(w, room.plain, y, room.type, threads);
    else if (room.type == BFLOAT16) all_rows<AsB16>(w, room.plain, y, room.type, threads);
    else all_rows<As16>(w, room.plain, y, room.type, threads);
    return 0;
}

// Several weights of the same input, their outputs one behind the other.
static int products(const Model& m, const Linear* w, int most, const void* x, uint8_t* y, Room& room) {
    int failed = 0;
    for (int i = 0; i < most && w[i].N; y += w[i++].N * bytes_of(room.type)) failed |= product(m, w[i], x, y, room);
    return failed;
}

// f as the model's type holds it
static inline float near(float f, Type type) {
    return type == FLOAT32 ? f : type == BFLOAT16 ? bf16_to_float(float_to_bf16(f)) : half_to_float(float_to_half(f));
}

// y = x / sqrt(mean x² + eps) · gain, n numbers
static void rms_norm(const void* x, const void* gain, void* y, int64_t n, double eps, Type type) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) { const float v = get(x, i, type); sum += double(v) * v; }
    const float factor = float(1 / std::sqrt(sum / n + eps));
    for (int64_t i = 0; i < n; i++) put(y, i, type, near(get(x, i, type) * factor, type) * get(gain, i, type));
}

static void rotate(void* head, const float* cosine, const float* sine, int64_t d, Type type) {
    for (int64_t i = 0; i < d / 2; i++) {
        const float a = get(head, i, type), b = get(head, i + d / 2, type);
        put(head, i, type, near(a * cosine[i], type) - near(b * sine[i], type));
        put(head, i + d / 2, type, near(b * cosine[i + d / 2], type) + near(a * sine[i + d / 2], type));
    }
}

// The query heads of one key-value head over `length` positions of the cache.
static void attend(const Model& m, const Block& block, int64_t h, int64_t length, int64_t capacity, const uint8_t* q, uint8_t* out,
                   Room& room) {
    const int64_t d = m.head_dim, wide = Room::padded(d), group = m.heads / m.kv_heads, size = bytes_of(room.type);
    float* row = room.scores + h * (group * (Room::padded(length) + 2 * wide) + wide);
    float *queries = row + wide, *sums = queries + group * wide, *scores = sums + group * wide;
    const uint8_t *keys = static_cast<const uint8_t*>(block.keys) + h * capacity * d * size;
    const uint8_t *values = static_cast<const uint8_t*>(block.cached) + h * capacity * d * size;
    const int64_t stride = Room::padded(length);
    for (int64_t g = 0; g < group; g++) {
        widen(q, h * group + g, d, wide, room.type, queries + g * wide);
        for (int64_t i = 0; i < d; i++) queries[g * wide + i] *= float(m.scaling);
    }
    for (int64_t t = 0; t < length; t++) {
        widen(keys, t, d, wide, room.type, row);
        for (int64_t g = 0; g < group; g++) {
            F acc = {};
            for (int64_t i = 0; i < wide; i += L) acc += load<F>(row + i) * load<F>(queries + g * wide + i);
            scores[g * stride + t] = total(acc);
        }
    }
    std::memset(sums, 0, group * wide * 4);
    for (int64_t g = 0; g < group; g++) {
        float* s = scores + g * stride;
        float most = -INFINITY, sum = 0;
        for (int64_t t = 0; t < length; t++) most = s[t] > most ? s[t] : most;
        for (int64_t t = length; t < stride; t++) s[t] = -INFINITY;
        for (int64_t t = 0; t < stride; t += L) store(s + t, exponential(load<F>(s + t) - most));
        for (int64_t t = 0; t < length; t++) sum += s[t];
        for (int64_t t = 0; t < length; t++) s[t] /= sum;
    }
    for (int64_t t = 0; t < length; t++) {
        widen(values, t, d, wide, room.type, row);
        for (int64_t g = 0; g < group; g++) {
            const float share = scores[g * stride + t];
            float* to = sums + g * wide;
            for (int64_t i = 0; i < wide; i += L) store(to + i, load<F>(to + i) + load<F>(row + i) * share);
        }
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < d; i++) put(out, (h * group + g) * d + i, room.type, sums[g * wide + i]);
}

static void add(void* x, const void* y, int64_t n, Type type) {
    for (int64_t i = 0; i < n; i++) put(x, i, type, get(x, i, type) + get(y, i, type));
}

// silu(gate) · up, of (gate, up) one behind the other
static void gated(const void* both, void* y, int64_t n, Type type) {
    for (int64_t i = 0; i < n; i += L) {
        const int64_t end = n - i < L ? n - i : L;
        float g[L] = {}, u[L] = {};
        for (int64_t j = 0; j < end; j++) g[j] = get(both, i + j, type), u[j] = get(both, n + i + j, type);
        const F gate = load<F>(g);
        store(g, gate / (1.0f + exponential(-gate)));
        for (int64_t j = 0; j < end; j++) put(y, i + j, type, near(g[j], type) * u[j]);
    }
}

// The logits of the token whose embedding is `embedding`, at `position`; its keys and values go into the caches. Returns 1 without
// memory.
extern "C" int step(const Model* model, const void* embedding, int64_t position, int64_t capacity, void* logits) {
    const Model& m = *model;
    Room room(m, position + 1);
    if (!room.bytes) return 1;
    const Type type = room.type;
    const int64_t size = bytes_of(type), d = m.head_dim, queries = m.heads * d, keys = m.kv_heads * d;
    const float *cosine = m.cosines + position * d, *sine = m.sines + position * d;
    int failed = 0;
    std::memcpy(room.x, embedding, m.hidden * size);
    for (const Block* b = m.blocks; b < m.blocks + m.count; b++) {
        rms_norm(room.x, b->before, room.normed, m.hidden, m.eps, type);
        failed |= products(m, b->qkv, 3, room.normed, room.wide, room);
        uint8_t *q = room.wide, *k = q + queries * size, *v = k + keys * size;
        for (int64_t h = 0; h < m.heads + m.kv_heads; h++) {
            uint8_t* head = q + h * d * size;
            const void* gain = h < m.heads ? b->q_norm : b->k_norm;
            if (gain) rms_norm(head, gain, head, d, m.eps, type);
            rotate(head, cosine, sine, d, type);
        }
        for (int64_t h = 0; h < m.kv_heads; h++) {
            std::memcpy(static_cast<uint8_t*>(b->keys) + (h * capacity + position) * d * size, k + h * d * size, d * size);
            std::memcpy(static_cast<uint8_t*>(b->cached) + (h * capacity + position) * d * size, v + h * d * size, d * size);
        }
        parallel(m.kv_heads, position * keys >= 1 << 14 ? m.threads : 1,
                 [&](int64_t h) { attend(m, *b, h, position + 1, capacity, q, room.normed, room); });
        failed |= product(m, b->o, room.normed, room.mixed, room);
        add(room.x, room.mixed, m.hidden, type);
        rms_norm(room.x, b->after, room.normed, m.hidden, m.eps, type);
        failed |= products(m, b->gate_up, 2, room.normed, room.wide, room);
        gated(room.wide, room.mixed, b->down.K, type);
        failed |= product(m, b->down, room.mixed, room.normed, room);
        add(room.x, room.normed, m.hidden, type);
    }
    rms_norm(room.x, m.norm, room.normed, m.hidden, m.eps, type);
    return failed | product(m, m.head, room.normed, logits, room);
}
