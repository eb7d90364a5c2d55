// The four big passes for the CPU, in float32 and bfloat16. __init__.py calls the functions at the end by ctypes,
// with plain pointers; as the Python module _cpp, which the install builds, the library is empty.
//
// A sample's maps, of `size` pixels each, lie one after the other or, channels last, as `size` rows of `channels`
// numbers. Moments, sums and coefficients are float32, (samples, channels). Sums run in float32 over blocks of fixed
// length and in float64 over blocks, in an order that does not depend on the number of threads.

#include <Python.h>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstring>
#include <memory>

#include "parallel.h"

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 1024;  // pixels of a map that are summed in float32
constexpr int64_t PART = 128;    // the same, channels last

typedef uint16_t BFloat16;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector4 __attribute__((vector_size(16)));

struct Maps {
    const void *x, *dy;  // dy: null where it takes no part
    void* out;           // of combine
    const float *mean, *a, *b1, *b0;
    float *first, *second, *parts;  // of sums
    int64_t samples, channels, size;
    bool channels_last;

    int64_t parts_of_sample() const { return (size + PART - 1) / PART; }
    int64_t length_of_part(int64_t i) const { return std::min(PART, size - i * PART); }
    int64_t elements() const { return samples * channels * size; }
    int64_t groups() const { return (channels + LANES - 1) / LANES; }
    int64_t tasks() const { return samples * (channels_last ? parts_of_sample() : channels); }
};

// One number, or LANES of them, in float32

template <typename V, typename T>
INLINE V load(const T* p) {
    V v;
    if constexpr (sizeof(T) == 4) {
        std::memcpy(&v, p, sizeof(V));
    } else if constexpr (sizeof(V) == 4) {
        const uint32_t bits = uint32_t(*p) << 16;
        std::memcpy(&v, &bits, sizeof(V));
    } else {
        Halves halves;
        std::memcpy(&halves, p, sizeof(Halves));
        const Bits bits = __builtin_convertvector(halves, Bits) << 16;
        std::memcpy(&v, &bits, sizeof(V));
    }
    return v;
}

template <typename V, typename T>
INLINE void store(T* p, V v) {  // bfloat16: to the nearest, ties to even; a NaN stays one
    if constexpr (sizeof(T) == 4) {
        std::memcpy(p, &v, sizeof(V));
    } else if constexpr (sizeof(V) == 4) {
        uint32_t bits;
        std::memcpy(&bits, &v, sizeof(V));
        *p = v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    } else {
        Bits bits;
        std::memcpy(&bits, &v, sizeof(V));
        const Bits nan = Bits(v != v);
        bits = (~nan & (bits + 0x7fff + (bits >> 16 & 1)) >> 16) | (nan & 0x7fc0);
        const Halves halves = __builtin_convertvector(bits, Halves);
        std::memcpy(p, &halves, sizeof(Halves));
    }
}

INLINE float total(Vector v) {
    Vector8 eights[2];
    std::memcpy(eights, &v, sizeof(v));
    const Vector8 eight = eights[0] + eights[1];
    Vector4 fours[2];
    std::memcpy(fours, &eight, sizeof(eight));
    const Vector4 four = fours[0] + fours[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

// Adds dy and dy * (x - shift), or, without dy, x - shift and its square.
template <bool GRAD, typename V, typename S, typename T>
INLINE void add(const T* x, const T* dy, S shift, V& sum, V& product) {
    const V distance = load<V>(x) - shift, factor = GRAD ? load<V>(dy) : distance;
    sum += factor;
    product += factor * distance;
}

// Whether the mean is more than 7 standard deviations from the value that was subtracted, so that squares cancel. Then
// the mean is to be subtracted; at first it is the first pixel.
INLINE bool is_far(float sum, float product, int64_t length) { return sum * sum > 0.98f * length * product; }

// Sums, maps one after the other

template <bool GRAD, typename T>
INLINE void sum_block(const T* x, const T* dy, float shift, int64_t size, float& sum, float& product) {
    Vector sums[2] = {}, products[2] = {};
    sum = product = 0;
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        add<GRAD>(x + i, dy + i, shift, sums[0], products[0]);
        add<GRAD>(x + i + LANES, dy + i + LANES, shift, sums[1], products[1]);
    }
    if (i + LANES <= size) {
        add<GRAD>(x + i, dy + i, shift, sums[0], products[0]);
        i += LANES;
    }
    for (; i < size; ++i) add<GRAD>(x + i, dy + i, shift, sum, product);
    sum += total(sums[0] + sums[1]);
    product += total(products[0] + products[1]);
}

template <typename T>
INLINE void moments_of_map(const T* x, int64_t size, float& mean, float& var) {
    double joint = 0, squares = 0;  // squares of distances from the mean, joined as by Chan, Golub & LeVeque (1983)
    for (int64_t i = 0; i < size; i += BLOCK) {
        const int64_t length = std::min(BLOCK, size - i);
        float shift = load<float>(x + i), sum, product;
        sum_block<false>(x + i, x + i, shift, length, sum, product);
        if (is_far(sum, product, length)) {
            shift += sum / length;
            sum_block<false>(x + i, x + i, shift, length, sum, product);
        }
        const double distance = sum / double(length), delta = shift + distance - joint;
        squares += std::max(product - sum * distance, 0.);
        if (i == 0) {
            joint = delta;
            continue;
        }
        const double weight = double(length) / (i + length);
        squares += delta * delta * weight * i;
        joint += delta * weight;
    }
    mean = joint;
    var = squares / size;
}

template <typename T>
INLINE void sum_maps(const Maps& m, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
        const T *x = (const T*)m.x + k * m.size, *dy = (const T*)m.dy + k * m.size;
        if (!m.dy) {
            moments_of_map(x, m.size, m.first[k], m.second[k]);
            continue;
        }
        double sums = 0, products = 0;
        for (int64_t i = 0; i < m.size; i += BLOCK) {
            float sum, product;
            sum_block<true>(x + i, dy + i, m.mean[k], std::min(BLOCK, m.size - i), sum, product);
            sums += sum;
            products += product;
        }
        m.first[k] = sums;
        m.second[k] = products;
    }
}

// Sums, channels last: first of parts of each sample, (samples, parts, 3, channels), where the three are the value
// that was subtracted, and the two sums; then over the parts

template <bool GRAD, typename V, typename T>
INLINE void sum_channels(const T* x, const T* dy, const float* shift, float* sum, float* product) {
    V sums = load<V>(sum), products = load<V>(product);
    add<GRAD>(x, dy, load<V>(shift), sums, products);
    store(sum, sums);
    store(product, products);
}

template <bool GRAD, typename T>
INLINE void sum_part(const T* x, const T* dy, int64_t channels, int64_t length, const float* shift, float* sum,
                     float* product) {
    std::fill_n(sum, 2 * channels, 0.f);
    for (int64_t i = 0; i < length; ++i, x += channels, dy += channels) {
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES)
            sum_channels<GRAD, Vector>(x + c, dy + c, shift + c, sum + c, product + c);
        for (; c < channels; ++c) sum_channels<GRAD, float>(x + c, dy + c, shift + c, sum + c, product + c);
    }
}

template <typename T>
INLINE void sum_parts(const Maps& m, int64_t begin, int64_t end) {
    const int64_t channels = m.channels;
    for (int64_t k = begin; k < end; ++k) {
        const int64_t n = k / m.parts_of_sample(), i = k % m.parts_of_sample(), length = m.length_of_part(i);
        const int64_t at = (n * m.size + i * PART) * channels;
        const T *x = (const T*)m.x + at, *dy = (const T*)m.dy + at;
        float *shift = m.parts + 3 * k * channels, *sum = shift + channels, *product = sum + channels;
        if (m.dy) {
            std::copy_n(m.mean + n * channels, channels, shift);
            sum_part<true>(x, dy, channels, length, shift, sum, product);
            continue;
        }
        for (int64_t c = 0; c < channels; ++c) shift[c] = load<float>(x + c);
        sum_part<false>(x, x, channels, length, shift, sum, product);
        bool far = false;
        for (int64_t c = 0; c < channels; ++c) far |= is_far(sum[c], product[c], length);
        if (far) {
            for (int64_t c = 0; c < channels; ++c) shift[c] += sum[c] / length;
            sum_part<false>(x, x, channels, length, shift, sum, product);
        }
        for (int64_t c = 0; c < channels; ++c) {  // to the mean, less shift, and the squares of distances from it
            const float distance = sum[c] / length;
            product[c] = std::max(product[c] - sum[c] * distance, 0.f);
            sum[c] = distance;
        }
    }
}

INLINE void join_parts(const Maps& m, int64_t begin, int64_t end) {
    const int64_t parts = m.parts_of_sample(), stride = 3 * m.channels;
    for (int64_t k = begin; k < end; ++k) {
        const int64_t n = k / m.groups(), start = k % m.groups() * LANES, width = std::min(LANES, m.channels - start);
        const float* shift = m.parts + n * parts * stride + start;
        const float *first = shift + m.channels, *second = first + m.channels;
        double sums[LANES] = {}, products[LANES] = {};
        for (int64_t i = 0, at = 0; i < parts; ++i, at += stride)
            for (int64_t c = 0; c < width; ++c) {
                const double mean = double(shift[at + c]) + first[at + c];
                sums[c] += m.dy ? first[at + c] : mean * (double(m.length_of_part(i)) / m.size);
                products[c] += second[at + c];
            }
        for (int64_t i = 0, at = 0; i < parts && !m.dy; ++i, at += stride)
            for (int64_t c = 0; c < width; ++c) {  // the squares of distances between the means
                const double delta = double(shift[at + c]) + first[at + c] - sums[c];
                products[c] += delta * delta * m.length_of_part(i);
            }
        for (int64_t c = 0; c < width; ++c) {
            m.first[n * m.channels + start + c] = sums[c];
            m.second[n * m.channels + start + c] = m.dy ? products[c] : products[c] / m.size;
        }
    }
}

// The passes that write maps

// Asks for pages of 2 MiB where the system leaves that to programs. Blocks from 32 MiB on are mapped anew by glibc each
// time, and writing to 512 times as many pages of 4 KiB takes longer than the numbers do. Smaller ones are used again.
void ask_for_huge_pages(void* out, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t PAGE = 1 << 21, MAPPED_ALONE = 1 << 25;
    const uintptr_t begin = ((uintptr_t)out + PAGE - 1) & -PAGE, end = ((uintptr_t)out + bytes) & -PAGE;
    if (uintptr_t(bytes) >= MAPPED_ALONE) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // refused: as before
#endif
}

// Whether to write past the cache, for a run of numbers without gaps. A line that is written as a whole then need not be
// read before; but one that two runs share takes much longer. Smaller maps, which whatever comes next finds in the cache,
// and bfloat16, whose arithmetic takes longer than the memory, are better off with it.
template <typename T>
bool are_streamed(const Maps& m, int64_t run) {
#ifdef __SSE2__
    constexpr int64_t LARGE = 1 << 24, LONG = 4096, LINE = 64;
    const int64_t bytes = run * sizeof(T), all = m.elements() * sizeof(T);
    return sizeof(T) == 4 && all >= LARGE && uintptr_t(m.out) % LINE == 0 && (bytes % LINE == 0 || bytes >= LONG);
#else
    return false;
#endif
}

template <bool STREAM, typename T>
INLINE void put(T* p, Vector v) {
#ifdef __SSE2__
    if constexpr (STREAM && sizeof(T) == 4) {
        __m128 parts[4];
        std::memcpy(parts, &v, sizeof(v));
        for (int64_t i = 0; i < 4; ++i) _mm_stream_ps(p + 4 * i, parts[i]);
        return;
    }
#endif
    store(p, v);
}

template <bool STREAM>
INLINE void end_stream() {
#ifdef __SSE2__
    if (STREAM) _mm_sfence();
#endif
}

template <bool GRAD, typename V, typename T>
INLINE V combine(const T* x, const T* dy, V mean, V a, V b1, V b0) {
    V y = b1 * (load<V>(x) - mean) + b0;
    if (GRAD) y += a * load<V>(dy);
    return y;
}

template <bool GRAD, bool STREAM, typename T>
INLINE void combine_maps(const Maps& m, int64_t begin, int64_t end) {
    const Vector zero = {};
    for (int64_t k = begin; k < end; ++k) {
        const T *x = (const T*)m.x + k * m.size, *dy = (const T*)m.dy + k * m.size;
        T* out = (T*)m.out + k * m.size;
        const float mean = m.mean[k], a = GRAD ? m.a[k] : 0, b1 = m.b1[k], b0 = m.b0[k];
        int64_t i = 0;
        if (STREAM)  // as far as a line of the cache is shared with the map before
            for (; i < m.size && uintptr_t(out + i) % 64; ++i) store(out + i, combine<GRAD>(x + i, dy + i, mean, a, b1, b0));
        for (; i + LANES <= m.size; i += LANES)
            put<STREAM>(out + i, combine<GRAD, Vector>(x + i, dy + i, zero + mean, zero + a, zero + b1, zero + b0));
        for (; i < m.size; ++i) store(out + i, combine<GRAD>(x + i, dy + i, mean, a, b1, b0));
    }
    end_stream<STREAM>();
}

template <bool GRAD, typename V, typename T>
INLINE V combine_channels(const Maps& m, int64_t at, int64_t k) {
    const V mean = load<V>(m.mean + k), a = GRAD ? load<V>(m.a + k) : V{};
    return combine<GRAD>((const T*)m.x + at, (const T*)m.dy + at, mean, a, load<V>(m.b1 + k), load<V>(m.b0 + k));
}

template <bool GRAD, bool STREAM, typename T>
INLINE void combine_parts(const Maps& m, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
        const int64_t n = k / m.parts_of_sample(), i = k % m.parts_of_sample();
        for (int64_t row = n * m.size + i * PART, rows = m.length_of_part(i); rows; ++row, --rows) {
            T* out = (T*)m.out + row * m.channels;
            int64_t c = 0;
            for (; c + LANES <= m.channels; c += LANES)
                put<STREAM>(out + c, combine_channels<GRAD, Vector, T>(m, row * m.channels + c, n * m.channels + c));
            for (; c < m.channels; ++c)
                store(out + c, combine_channels<GRAD, float, T>(m, row * m.channels + c, n * m.channels + c));
        }
    }
    end_stream<STREAM>();
}

// What is compiled for each CPU: the ways through the templates

template <typename T>
INLINE void sum_tasks(const Maps& m, int64_t begin, int64_t end) {
    m.channels_last ? sum_parts<T>(m, begin, end) : sum_maps<T>(m, begin, end);
}

template <bool GRAD, typename T>
INLINE void combine_tasks(const Maps& m, int64_t begin, int64_t end) {
    if (m.channels_last) {
        const bool stream = are_streamed<T>(m, m.channels) && m.channels % LANES == 0;
        stream ? combine_parts<GRAD, true, T>(m, begin, end) : combine_parts<GRAD, false, T>(m, begin, end);
    } else {
        const bool stream = are_streamed<T>(m, m.size);
        stream ? combine_maps<GRAD, true, T>(m, begin, end) : combine_maps<GRAD, false, T>(m, begin, end);
    }
}

template <typename T>
INLINE void combine_tasks(const Maps& m, int64_t begin, int64_t end) {
    m.dy ? combine_tasks<true, T>(m, begin, end) : combine_tasks<false, T>(m, begin, end);
}

FOR_EACH_CPU void sum_float(const Maps& m, int64_t begin, int64_t end) { sum_tasks<float>(m, begin, end); }
FOR_EACH_CPU void sum_half(const Maps& m, int64_t begin, int64_t end) { sum_tasks<BFloat16>(m, begin, end); }
FOR_EACH_CPU void join(const Maps& m, int64_t begin, int64_t end) { join_parts(m, begin, end); }
FOR_EACH_CPU void combine_float(const Maps& m, int64_t begin, int64_t end) { combine_tasks<float>(m, begin, end); }
FOR_EACH_CPU void combine_half(const Maps& m, int64_t begin, int64_t end) { combine_tasks<BFloat16>(m, begin, end); }

}  // namespace

extern "C" {

// What was compiled: the version of the package, and the hash of the sources.
const char* sn_stamp() { return SN_STAMP; }

// Without dy, pass 1: mean and biased variance of each map. With dy, pass 3: sums of dy and of dy * (x - mean).
void sn_sums(const void* x, const void* dy, const float* mean, float* first, float* second, int64_t samples,
             int64_t channels, int64_t size, int channels_last, int bfloat16, int64_t threads) {
    Maps m = {x,     dy,     nullptr, mean,    nullptr,  nullptr, nullptr,
              first, second, nullptr, samples, channels, size,    bool(channels_last)};
    const int64_t numbers = channels_last ? 3 * samples * m.parts_of_sample() * channels : 0;
    const std::unique_ptr<float[]> parts(new float[numbers]);
    m.parts = parts.get();
    run(bfloat16 ? sum_half : sum_float, m, m.tasks(), m.elements(), threads);
    if (channels_last) run(join, m, samples * m.groups(), numbers, threads);
}

// Without dy, pass 2: b1*(x - mean) + b0. With dy, pass 4: a*dy + b1*(x - mean) + b0.
void sn_combine(const void* x, const void* dy, void* out, const float* mean, const float* a, const float* b1,
                const float* b0, int64_t samples, int64_t channels, int64_t size, int channels_last, int bfloat16,
                int64_t threads) {
    const Maps m = {x,       dy,      out,     mean,    a,        b1,   b0,
                    nullptr, nullptr, nullptr, samples, channels, size, bool(channels_last)};
    ask_for_huge_pages(out, m.elements() * (bfloat16 ? 2 : 4));
    run(bfloat16 ? combine_half : combine_float, m, m.tasks(), m.elements(), threads);
}

}  // extern "C"

PyMODINIT_FUNC PyInit__cpp() {
    static PyModuleDef module = {};
    module.m_base = PyModuleDef_HEAD_INIT;
    module.m_name = "_cpp";
    return PyModule_Create(&module);
}
