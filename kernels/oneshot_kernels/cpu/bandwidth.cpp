// How fast this machine reads memory: the ceiling of every kernel here. Four address streams a thread, as linear.cpp has.
#include "parallel.h"
#include "vectors.h"

// The sum of all words of `bytes` bytes (rounded down to whole pieces), read by `threads` threads.
extern "C" uint32_t read_all(const uint8_t* p, int64_t bytes, int64_t threads) {
    constexpr int64_t STREAMS = 4, PIECE = 1 << 16;  // bytes of one stream of one piece of work
    std::atomic<uint32_t> total{0};
    parallel(bytes / (STREAMS * PIECE), threads, [&](int64_t i) {
        const uint8_t* at = p + i * STREAMS * PIECE;
        U sum[STREAMS][2] = {};
        for (int64_t j = 0; j < PIECE; j += 2 * VECTOR)
            for (int s = 0; s < STREAMS; s++)
                for (int h = 0; h < 2; h++) sum[s][h] += load<U>(at + s * PIECE + j + h * VECTOR);
        uint32_t mine = 0;
        for (int s = 0; s < STREAMS; s++) for (int h = 0; h < 2; h++) for (int l = 0; l < L; l++) mine += sum[s][h][l];
        total += mine;
    });
    return total;
}
