// CPUID: what this CPU and its operating system can run. Bit 0: x86-64-v3 (AVX2, FMA). Bit 1: AVX-512 with VNNI.
extern "C" int features() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    return v3 | v4 << 1;
#else
    return 0;
#endif
}
