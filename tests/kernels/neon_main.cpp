// A program for qemu that calls the NEON variant of a library: reads one problem from a file, writes the result to another.
// argv: library (linear, integers or column_loop), input, output. Input: int64 count of arrays, their int64 sizes in bytes, the
// arrays in the order of the C function's pointers (size 0: null), then its numbers, int64 each. Output: the array that is written.
#include <cstdint>
#include <cstdio>
#include <vector>
extern "C" {
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
#else
    const int64_t result = 0;
    column_loop_float32((float*)p[0], (float*)p[1], (uint8_t*)p[2], n[0], n[1], n[2], n[3], nullptr, 1, 0, 0, nullptr, 1);
#endif
    std::FILE* out = std::fopen(argv[2], "wb");
    std::fwrite(p[result], 1, sizes[result], out);
    return std::fclose(out);
}
