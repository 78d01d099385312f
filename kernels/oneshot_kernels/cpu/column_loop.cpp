// SparseGPT's loop over the columns of one block (arXiv 2301.00774, algorithm 1), with rows of W on SIMD lanes.
//
//   W  (b, R)  a block of the weight, transposed; becomes Ŵ        U  (b, b)  upper triangular: the block of H⁻¹'s factor
//   n, m       n of m are kept, chosen at every m-th column from the values it has then; m = 0: the mask is given
//
// For column j:  q_j = keep ? grid(w_j) : 0,   e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk for all k > j.
// Rows do not touch each other, so a tile of TR rows goes through all columns on its own: any number of threads gives
// the same bits. Updates are collected: a panel of four columns subtracts everything left of it at once, from the errors
// kept in cache, which is a small matrix product (4 x NV accumulators in registers) instead of b passes over the block.
#include <cstring>
#include <cstdlib>
#include "parallel.h"

#if defined(__AVX512F__)
constexpr int VECTOR = 64, NV = 4;
#elif defined(__AVX2__)
constexpr int VECTOR = 32, NV = 2;
#else
constexpr int VECTOR = 16, NV = 4;
#endif
constexpr int PANEL = 4;

template <typename T> struct Types;
template <> struct Types<float> { typedef int32_t Int; static constexpr float magic = 12582912.0f; };             // 1.5 * 2^23
template <> struct Types<double> { typedef int64_t Int; static constexpr double magic = 6755399441055744.0; };    // 1.5 * 2^52

template <typename T> struct Loop {
    typedef typename Types<T>::Int Int;
    static constexpr int L = VECTOR / sizeof(T), TR = L * NV;
    typedef T V __attribute__((vector_size(VECTOR)));
    typedef Int I __attribute__((vector_size(VECTOR)));

    T* W; const T* U; uint8_t* mask; int64_t b, R; int n, m;
    const T* scale; int64_t width; T low, high; int8_t* codes;   // the grid: scale null means that kept weights stay

    // P columns w of a tile lose the products of n columns err with n rows of u (ld numbers apart), P numbers of each
    template <int P> static void apply(V (*w)[NV], const V (*err)[NV], const T* u, int64_t ld, int64_t n) {
        V acc[P][NV] = {};   // summed from zero: half the rounding error
        for (int64_t i = 0; i < n; i++, u += ld) {
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) acc[p][v] += err[i][v] * u[p];
            }
        }
        for (int p = 0; p < P; p++) for (int v = 0; v < NV; v++) w[p][v] -= acc[p][v];
    }
    static void apply_any(int64_t columns, V (*w)[NV], const V (*err)[NV], const T* u, int64_t ld, int64_t n) {
        switch (columns) {
            case 4: apply<4>(w, err, u, ld, n); break;
            case 3: apply<3>(w, err, u, ld, n); break;
            case 2: apply<2>(w, err, u, ld, n); break;
            default: apply<1>(w, err, u, ld, n);
        }
    }

    // The n highest of m scores (w / U_jj)² stay; of equal ones the right. A column stays if at least m - n others are
    // below it, where an equal one counts as below if it is further left.
    void choose(const V (*w)[NV], I (*keep)[NV], int64_t j, V* score, I* rank) const {
        for (int v = 0; v < NV; v++) {
            for (int a = 0; a < m; a++) {
                V s = w[a][v] / U[(j + a) * b + j + a];
                score[a] = s < 0 ? -s : s;
                rank[a] = I{};
            }
            for (int a = 1; a < m; a++)
                for (int c = 0; c < a; c++) {
                    I below = score[c] <= score[a];   // -1 or 0
                    rank[a] -= below;
                    rank[c] += 1 + below;
                }
            for (int a = 0; a < m; a++) keep[a][v] = rank[a] >= Int(m - n);
        }
    }

    V on_grid(V w, V s, int8_t* code) const {
        V x = w / s;
        const V least = V{} + low, most = V{} + high;
        x = x > most ? most : x;
        x = x < least ? least : x;
        const V magic = V{} + Types<T>::magic;
        x = (x + magic) - magic;                      // to the nearest integer, ties to even, as torch.round
        if (codes) for (int l = 0; l < L; l++) code[l] = int8_t(x[l]);
        return x * s;
    }

    // One tile: rows [r0, r0 + rows), all columns. `space` holds the errors, one group of columns, scores and ranks.
    void tile(int64_t r0, int64_t rows, V* space) const {
        const int64_t group = m > PANEL ? m : m ? PANEL / m * m : PANEL;
        V (*err)[NV] = reinterpret_cast<V (*)[NV]>(space);
        V (*w)[NV] = err + b;
        I (*keep)[NV] = reinterpret_cast<I (*)[NV]>(w + group);
        V* score = reinterpret_cast<V*>(keep + group);
        I* rank = reinterpret_cast<I*>(score + group);
        const int panel = group < PANEL ? int(group) : PANEL;
        alignas(64) uint8_t bytes[TR];
        alignas(64) int8_t code[TR];
        for (int64_t g = 0; g < b; g += group) {
            const int64_t end = g + group < b ? g + group : b;
            for (int64_t j = g; j < end; j++) {
                std::memset(w[j - g], 0, sizeof(w[0]));
                std::memcpy(w[j - g], W + j * R + r0, rows * sizeof(T));
            }
            for (int64_t p = g; p < end; p += panel)
                apply_any(end - p < panel ? end - p : panel, w + (p - g), err, U + p, b, g);
            for (int64_t p = g; p < end; p += panel) {
                const int64_t stop = p + panel < end ? p + panel : end;
                if (p > g) apply_any(stop - p, w + (p - g), err + g, U + g * b + p, b, p - g);
                for (int64_t j = p; j < stop; j++) {
                    V* wj = w[j - g];
                    I* kj = keep[j - g];
                    if (m && j % m == 0) choose(w + (j - g), keep + (j - g), j, score, rank);
                    if (!m) {
                        std::memset(bytes, 0, TR);
                        std::memcpy(bytes, mask + j * R + r0, rows);
                        for (int v = 0; v < NV; v++)
                            for (int l = 0; l < L; l++) kj[v][l] = -Int(bytes[v * L + l]);
                    }
                    const V d = V{} + U[j * b + j];
                    V q[NV];
                    for (int v = 0; v < NV; v++) {
                        q[v] = wj[v];
                        if (scale) {
                            V s = V{} + T(1);
                            const int64_t left = rows - v * L;
                            if (left > 0) std::memcpy(&s, scale + j / width * R + r0 + v * L, (left < L ? left : L) * sizeof(T));
                            q[v] = on_grid(wj[v], s, code + v * L);
                            if (codes) for (int l = 0; l < L; l++) code[v * L + l] &= int8_t(kj[v][l]);
                        }
                        q[v] = V(I(q[v]) & kj[v]);
                        err[j][v] = (wj[v] - q[v]) / d;
                    }
                    for (int64_t k = j + 1; k < stop; k++)
                        for (int v = 0; v < NV; v++) w[k - g][v] -= err[j][v] * U[j * b + k];
                    std::memcpy(W + j * R + r0, q, rows * sizeof(T));
                    if (codes) std::memcpy(codes + j * R + r0, code, rows);
                    if (m) {
                        for (int v = 0; v < NV; v++)
                            for (int l = 0; l < L; l++) bytes[v * L + l] = uint8_t(kj[v][l] & 1);
                        std::memcpy(mask + j * R + r0, bytes, rows);
                    }
                }
            }
        }
    }

    int run(int64_t threads) const {
        const int64_t group = m > PANEL ? m : PANEL, bytes = ((b + 2 * group) * NV + 2 * group) * VECTOR;
        std::atomic<int> failed{0};
        parallel((R + TR - 1) / TR, threads, [&](int64_t t) {
            void* space = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
            if (!space) { failed = 1; return; }
            tile(t * TR, R - t * TR < TR ? R - t * TR : TR, static_cast<V*>(space));
            std::free(space);
        });
        return failed;
    }
};

// What a block of b columns is when all before it are done:  W = E_B + U^T (before + V_:B^T E),  U = V_BB^-1.
//
//   E  (first + b, R)  of `first` columns what they lost, of the block's what they are; V (first + b, first + b), rows
//   ld numbers apart: the upper triangular factor of H; before (b, R), or null: what columns before these add
template <typename T> struct Current {
    typedef Loop<T> Tile;
    typedef typename Tile::V V;
    static constexpr int L = Tile::L, TR = Tile::TR, CHUNK = 96;   // columns of errors that stay in the L1 cache

    T *W, *U; const T *E, *factor, *before; int64_t ld, first, b, R;

    // U, row by row from below, eight vectors of a row at a time. space: b rows of `wide` vectors.
    void invert(V* space, int64_t wide) const {
        const T* D = factor + first * ld + first;
        for (int64_t i = b; i--;) {
            for (int64_t c = i / L / 8 * 8; c < wide; c += 8) {
                V row[8] = {};
                if (i / L - c >= 0) row[i / L - c][i % L] = 1;
                for (int64_t k = i + 1; k < b; k++)
#pragma GCC unroll 8
                    for (int v = 0; v < 8; v++) row[v] -= space[k * wide + c + v] * D[i * ld + k];
                for (int v = 0; v < 8; v++) space[i * wide + c + v] = row[v] / D[i * ld + i];
            }
            std::memset(U + i * b, 0, b * sizeof(T));
            std::memcpy(U + i * b + i, reinterpret_cast<T*>(space + i * wide) + i, (b - i) * sizeof(T));
        }
    }

    void tile(int64_t r0, int64_t rows, V* space, const T* packed) const {
        V (*sum)[NV] = reinterpret_cast<V (*)[NV]>(space);         // minus (before + V_:B^T E)
        V (*part)[NV] = sum + b;
        if (before) take(sum, before + r0, b, rows); else std::memset(sum, 0, b * sizeof(sum[0]));
        if (before) for (int64_t i = 0; i < b; i++) for (int v = 0; v < NV; v++) sum[i][v] = -sum[i][v];
        for (int64_t i = 0; i < first; i += CHUNK) {
            const int64_t n = first - i < CHUNK ? first - i : CHUNK;
            take(part, E + i * R + r0, n, rows);
            for (int64_t p = 0; p < b; p += PANEL)
                Tile::apply_any(b - p < PANEL ? b - p : PANEL, sum + p, part, packed + p * first + i * PANEL, PANEL, n);
        }
        for (int64_t p = 0; p < b; p += PANEL) {
            const int64_t columns = b - p < PANEL ? b - p : PANEL;
            take(part, E + (first + p) * R + r0, columns, rows);
            Tile::apply_any(columns, part, sum, U + p, b, p + columns);   // U is zero below its diagonal
            for (int64_t k = 0; k < columns; k++) std::memcpy(W + (p + k) * R + r0, part[k], rows * sizeof(T));
        }
    }
    void take(V (*to)[NV], const T* from, int64_t columns, int64_t rows) const {
        for (int64_t i = 0; i < columns; i++) {
            if (rows < TR) std::memset(to[i], 0, sizeof(to[0]));
            std::memcpy(to[i], from + i * R, rows * sizeof(T));
        }
    }

    int run(int64_t threads) const {
        const int64_t panels = (b + PANEL - 1) / PANEL;
        const int64_t wide = (b + 8 * L - 1) / (8 * L) * 8, bytes = b * wide * VECTOR;
        // V_:B by panels of columns, behind the work space of `invert`
        V* const space = static_cast<V*>(std::aligned_alloc(64, bytes + (first * panels * PANEL * sizeof(T) + 63) / 64 * 64));
        if (!space) return 1;
        T* packed = reinterpret_cast<T*>(space + b * wide);
        std::memset(space, 0, bytes);
        invert(space, wide);
        for (int64_t i = 0; i < first; i++)
            for (int64_t j = 0; j < b; j += PANEL)
                if (b - j >= PANEL) std::memcpy(packed + j * first + i * PANEL, factor + i * ld + first + j, PANEL * sizeof(T));
                else std::memcpy(packed + j * first + i * PANEL, factor + i * ld + first + j, (b - j) * sizeof(T));
        std::atomic<int> failed{0};
        parallel((R + TR - 1) / TR, threads, [&](int64_t t) {
            void* own = std::aligned_alloc(64, (b + CHUNK) * NV * VECTOR);
            if (!own) { failed = 1; return; }
            tile(t * TR, R - t * TR < TR ? R - t * TR : TR, static_cast<V*>(own), packed);
            std::free(own);
        });
        std::free(space);
        return failed;
    }
};

// Returns 0, or 1 if memory ran out. All matrices are contiguous; scale (ceil(b / width), R); codes (b, R), or null.
#define EXPORT(NAME, T)                                                                                              \
    extern "C" int NAME(T* W, const T* U, uint8_t* mask, int64_t b, int64_t R, int64_t n, int64_t m, const T* scale, \
                        int64_t width, int64_t low, int64_t high, int8_t* codes, int64_t threads) {                  \
        return Loop<T>{W, U, mask, b, R, int(n), int(m), scale, width, T(low), T(high), codes}.run(threads);         \
    }                                                                                                                \
    extern "C" int NAME##_current(T* W, T* U, const T* E, const T* V, const T* before, int64_t ld, int64_t first,    \
                                  int64_t b, int64_t R, int64_t threads) {                                           \
        return Current<T>{W, U, E, V, before, ld, first, b, R}.run(threads);                                         \
    }
EXPORT(column_loop_float32, float)
EXPORT(column_loop_float64, double)
