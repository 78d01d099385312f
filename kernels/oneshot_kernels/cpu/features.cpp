// CPUID: what this CPU and its operating system can run. Bit 0: x86-64-v3 (AVX2, FMA). Bit 1: AVX-512 with VNNI. Bit 2: that,
// and products of bfloat16 and int8 on tile registers (AMX), for which Linux has to be asked.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static bool amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);  // AMX-BF16, -TILE, -INT8
#if defined(__linux__)
    constexpr long ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: for all threads, until the process ends
    return there && !syscall(SYS_arch_prctl, ASK, TILES);
#else
    return false;
#endif
}
#endif

extern "C" int features() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    return v3 | v4 << 1 | (v4 && amx()) << 2;
#else
    return 0;
#endif
}
