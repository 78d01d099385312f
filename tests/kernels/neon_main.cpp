// A program for qemu that calls the NEON variant of a library: reads one problem from a file, writes the result to another.
// argv: library (linear, integers or column_loop), input, output. Input: int64 count of arrays, their int64 sizes in bytes, the
// arrays in the order of the C function's pointers (size 0: null), then its numbers, int64 each. Output: the array that is written.
#include <cstdint>
#include <cstdio>
#include <vector>
#include "step.h"
extern "C" {
int step(const Model*, const void*, int64_t, int64_t, void*);
int linear(const void*, const uint8_t*, const uint32_t*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t);
int linear_integers(const void*, const uint8_t*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t);
int column_loop_float32(float*, const float*, uint8_t*, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, int64_t,
                        int64_t, int8_t*, int64_t);
}

int main(int, char** argv) {
    std::FILE* in = std::fopen(argv[1], "rb");
    int64_t count = 0;
    if (!in || std::fread(&count, 8, 1, in) != 1) return 2;
    std::vector<int64_t> sizes(count);
    std::fread(sizes.data(), 8, count, in);
    std::vector<std::vector<uint8_t>> arrays(count);
    std::vector<void*> p(count);
    for (int64_t i = 0; i < count; i++) {
        arrays[i].resize(sizes[i]);
        std::fread(arrays[i].data(), 1, sizes[i], in);
        p[i] = sizes[i] ? arrays[i].data() : nullptr;
    }
    int64_t n[8] = {};
    std::fread(n, 8, 8, in);
    std::fclose(in);
#if defined(LINEAR)
    const int64_t result = 4;
    linear(p[0], (uint8_t*)p[1], (uint32_t*)p[2], p[3], p[4], n[0], n[1], n[2], n[3], 1);
#elif defined(INTEGERS)
    const int64_t result = 4;
    linear_integers(p[0], (uint8_t*)p[1], p[2], p[3], p[4], n[0], n[1], n[2], n[3], n[4], n[5], n[6], 1);
#elif defined(STEP)
    // arrays: of two blocks q k v o gate up down before after q_norm k_norm, then norm, head, cosines, sines, x (T, hidden), logits
    const int64_t hidden = n[0], heads = n[1], groups = n[2], d = n[3], mlp = n[4], tokens = n[6], V = n[7], result = 27;
    const int64_t bytes = sizes[26] / (tokens * hidden);  // of a number
    Block blocks[2] = {};
    std::vector<uint8_t> caches[4];
    for (int i = 0; i < 2; i++) {
        const auto own = [&](int at, int64_t N, int64_t K) { return Linear{(uint8_t*)p[11 * i + at], nullptr, nullptr, nullptr, N, K, 0}; };
        for (int c = 0; c < 2; c++) caches[2 * i + c].resize(groups * tokens * d * bytes);
        blocks[i] = {{own(0, heads * d, hidden), own(1, groups * d, hidden), own(2, groups * d, hidden)}, own(3, hidden, heads * d),
                     {own(4, mlp, hidden), own(5, mlp, hidden)}, own(6, hidden, mlp), p[11 * i + 7], p[11 * i + 8], p[11 * i + 9],
                     p[11 * i + 10], caches[2 * i].data(), caches[2 * i + 1].data()};
    }
    const Linear head{(uint8_t*)p[23], nullptr, nullptr, nullptr, V, hidden, 0};
    const Model model{blocks, 2, hidden, heads, groups, d, mlp, n[5], 1, 1e-5, 0.3, (float*)p[24], (float*)p[25], p[22], head, nullptr, nullptr};
    for (int64_t t = 0; t < tokens; t++)
        if (step(&model, (uint8_t*)p[26] + t * hidden * bytes, t, tokens, (uint8_t*)p[27] + t * V * bytes)) return 3;
#else
    const int64_t result = 0;
    column_loop_float32((float*)p[0], (float*)p[1], (uint8_t*)p[2], n[0], n[1], n[2], n[3], nullptr, 1, 0, 0, nullptr, 1);
#endif
    std::FILE* out = std::fopen(argv[2], "wb");
    std::fwrite(p[result], 1, sizes[result], out);
    return std::fclose(out);
}
