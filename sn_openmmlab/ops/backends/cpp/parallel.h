// How the kernels for the CPU are compiled and spread over threads, and what algebra.cpp calls of passes.cpp.

#pragma once

#include <algorithm>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("default", "avx2", "avx512f")))  // chosen as the library is loaded
#else
#define FOR_EACH_CPU
#endif

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread, as to torch

// Each thread takes a run of tasks. The threads are torch's: the process has loaded its OpenMP before this library.
template <typename T>
void run(void kernel(const T&, int64_t, int64_t), const T& t, int64_t tasks, int64_t elements, int64_t threads) {
    threads = std::max<int64_t>(std::min({threads, tasks, elements / GRAIN + 1}), 1);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < threads; ++i) kernel(t, tasks * i / threads, tasks * (i + 1) / threads);
}

extern "C" {
void sn_sums(const void* x, const void* dy, const float* mean, float* first, float* second, int64_t samples,
             int64_t channels, int64_t size, int channels_last, int bfloat16, int64_t threads);
void sn_combine(const void* x, const void* dy, void* out, const float* mean, const float* a, const float* b1,
                const float* b0, int64_t samples, int64_t channels, int64_t size, int channels_last, int bfloat16,
                int64_t threads);
}
