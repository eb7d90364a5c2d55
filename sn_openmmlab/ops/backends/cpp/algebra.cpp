// The algebra of backends/algebra.py on the CPU, with its names: one call each way, so that small layers do not wait for
// some thirty operations. __init__.py calls the functions at the end, with the block of Arguments.
//
// Moments of maps and coefficients are float32, (samples, channels). Joint moments and all sums are float64, so that
// distances between means do not cancel.

#include <cmath>
#include <cstring>
#include <memory>

#include "parallel.h"

namespace {

constexpr int64_t COLUMNS = 64;  // channels whose sums over samples are taken side by side

struct Ratios {
    double in, ln, bn;  // 0 for what takes no part
};

struct Row {  // sums over the channels of a sample
    double dmean, dvar;
    double dmean_ln, dmean_bn;  // of dmean times the distance to LN's mean, and to BN's
    double dvar_in, dvar_bn;    // of dvar times the variance
};

struct Arguments {  // as in __init__.py; addresses of what takes no part are null
    int64_t samples, channels, size;
    int64_t in, ln, bn;  // the normalizers' places among the logits, -1 for what takes no part
    int64_t frozen;      // whether the BN moments are constants
    int64_t channels_last, bfloat16;
    double eps;
    int64_t threads;
    double momentum;  // of the running statistics; negative: all batches weigh the same
    const void* x;
    const float *mean_logits, *var_logits;
    const float *weight, *bias;  // null for 1 and 0
    float *running_mean, *running_var;
    int64_t* tracked;
    const void* dy;
    void* out;
    const float* mean;    // moments, (2, samples, channels)
    double* joint;        // means and variances of LN (samples) and of BN (channels), and BN's number of pixels
    double* shared;       // sums over samples, which a sum over processes makes those of all; or null
    float* coefficients;  // written: a and s, or b1, b0 and a
    const float* sum_dy;  // sums, (2, samples, channels)
    float* dweight;       // written: the gradients of weight, bias, mean_logits and var_logits

    explicit Arguments(const char* block) { std::memcpy(this, block, sizeof(Arguments)); }
    int64_t elements() const { return samples * channels; }
};

Ratios softmax(const Arguments& t, const float* logits) {
    double highest = -INFINITY;
    for (int64_t place : {t.in, t.ln, t.bn})
        if (place >= 0) highest = std::max<double>(highest, logits[place]);
    auto power = [&](int64_t place) { return place < 0 ? 0 : std::exp(logits[place] - highest); };
    const double in = power(t.in), ln = power(t.ln), bn = power(t.bn), sum = in + ln + bn;
    return {in / sum, ln / sum, bn / sum};
}

struct Algebra : Arguments {
    Ratios mean_ratios, var_ratios;
    const float *var, *sum_dyx;
    double *mean_ln, *var_ln, *mean_bn, *var_bn, *count;
    Row* rows = nullptr;                                         // of backward, (samples)
    float *rstd = nullptr, *a = nullptr, *sum_dyxhat = nullptr;  // of backward, (samples, channels)
    double *dmean = nullptr, *dvar = nullptr;                    // of backward, sums over samples (channels)

    explicit Algebra(const Arguments& t) : Arguments(t) {
        mean_ratios = softmax(*this, mean_logits), var_ratios = softmax(*this, var_logits);
        var = mean + elements(), sum_dyx = sum_dy + elements();
        mean_ln = joint, var_ln = mean_ln + samples, mean_bn = var_ln + samples, var_bn = mean_bn + channels;
        count = var_bn + channels;
    }
};

// Distance of the blended mean from the map's
INLINE float shift_at(const Algebra& t, int64_t n, int64_t c) {
    const double mean = t.mean[n * t.channels + c];
    return t.mean_ratios.ln * (t.mean_ln[n] - mean) + t.mean_ratios.bn * (t.mean_bn[c] - mean);
}

INLINE float rstd_at(const Algebra& t, int64_t n, int64_t c) {
    const double var = t.var_ratios.in * t.var[n * t.channels + c] + t.var_ratios.ln * t.var_ln[n];
    return 1 / std::sqrt(float(var + t.var_ratios.bn * t.var_bn[c] + t.eps));
}

INLINE float a_at(const Algebra& t, float rstd, int64_t c) { return t.weight ? t.weight[c] * rstd : rstd; }

// Forward

FOR_EACH_CPU void pool_rows(const Algebra& t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        const float *mean = t.mean + n * t.channels, *var = t.var + n * t.channels;
        double joint = 0, joint_var = 0;
#pragma omp simd reduction(+ : joint)
        for (int64_t c = 0; c < t.channels; ++c) joint += mean[c];
        joint /= t.channels;
#pragma omp simd reduction(+ : joint_var)
        for (int64_t c = 0; c < t.channels; ++c) joint_var += var[c] + (mean[c] - joint) * (mean[c] - joint);
        t.mean_ln[n] = joint;
        t.var_ln[n] = joint_var / t.channels;
    }
}

FOR_EACH_CPU void pool_columns(const Algebra& t, int64_t begin, int64_t end) {
    const double count = t.samples;
    for (int64_t start = begin; start < end; start += COLUMNS) {
        const int64_t width = std::min(COLUMNS, end - start);
        double joint[COLUMNS] = {}, joint_var[COLUMNS] = {};
        for (int64_t n = 0; n < t.samples; ++n)
            for (int64_t c = 0; c < width; ++c) joint[c] += t.mean[n * t.channels + start + c];
        for (int64_t c = 0; c < width; ++c) joint[c] /= count;
        for (int64_t n = 0; n < t.samples; ++n)
            for (int64_t c = 0; c < width; ++c) {
                const double distance = t.mean[n * t.channels + start + c] - joint[c];
                joint_var[c] += t.var[n * t.channels + start + c] + distance * distance;
            }
        for (int64_t c = 0; c < width; ++c) {
            t.mean_bn[start + c] = joint[c];
            t.var_bn[start + c] = joint_var[c] / count;
        }
    }
}

// What processes add up: size times the sums of means and of mean squares
FOR_EACH_CPU void share_columns(const Algebra& t, int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += COLUMNS) {
        const int64_t width = std::min(COLUMNS, end - start);
        double sums[COLUMNS] = {}, squares[COLUMNS] = {};
        for (int64_t n = 0; n < t.samples; ++n)
            for (int64_t c = 0; c < width; ++c) {
                const double mean = t.mean[n * t.channels + start + c];
                sums[c] += mean;
                squares[c] += t.var[n * t.channels + start + c] + mean * mean;
            }
        for (int64_t c = 0; c < width; ++c) {
            t.shared[start + c] = sums[c] * t.size;
            t.shared[t.channels + start + c] = squares[c] * t.size;
        }
    }
}

void take_shared(const Algebra& t) {
    const double count = std::max(*t.count, 1.);  // 0 where the batches of all processes are empty
    for (int64_t c = 0; c < t.channels; ++c) {
        t.mean_bn[c] = t.shared[c] / count;
        t.var_bn[c] = std::max(t.shared[t.channels + c] / count - t.mean_bn[c] * t.mean_bn[c], 0.);
    }
}

INLINE float moved(float old, float to, float weight) {  // as torch's lerp, which arrives where weight is 1
    return weight < 0.5f ? old + weight * (to - old) : to - (to - old) * (1 - weight);
}

// The variances that are kept are unbiased.
void move_statistics(const Algebra& t) {
    if (t.tracked) ++*t.tracked;
    const float weight = t.momentum < 0 ? 1.f / *t.tracked : t.momentum;
    const double unbiased = *t.count / std::max(*t.count - 1, 1.);
    for (int64_t c = 0; c < t.channels; ++c) {
        t.running_mean[c] = moved(t.running_mean[c], t.mean_bn[c], weight);
        t.running_var[c] = moved(t.running_var[c], t.var_bn[c] * unbiased, weight);
    }
}

FOR_EACH_CPU void blend(const Algebra& t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        float *a = t.coefficients + n * t.channels, *s = a + t.elements();
#pragma omp simd
        for (int64_t c = 0; c < t.channels; ++c) {
            a[c] = a_at(t, rstd_at(t, n, c), c);
            s[c] = (t.bias ? t.bias[c] : 0) - shift_at(t, n, c) * a[c];
        }
    }
}

// Backward

struct Gradients {
    float sum_dy, sum_dyxhat, a, dmean, dvar;  // dmean, dvar: w.r.t. the blended moments
};

// Found once, since roots and quotients take long
FOR_EACH_CPU void prepare_gradients(const Algebra& t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        const int64_t at = n * t.channels;
#pragma omp simd
        for (int64_t c = 0; c < t.channels; ++c) {
            const float rstd = rstd_at(t, n, c);
            t.rstd[at + c] = rstd;
            t.a[at + c] = a_at(t, rstd, c);
            t.sum_dyxhat[at + c] = rstd * (t.sum_dyx[at + c] - shift_at(t, n, c) * t.sum_dy[at + c]);
        }
    }
}

INLINE Gradients gradients_at(const Algebra& t, int64_t n, int64_t c) {
    const int64_t at = n * t.channels + c;
    const float sum_dy = t.sum_dy[at], sum_dyxhat = t.sum_dyxhat[at], a = t.a[at];
    return {sum_dy, sum_dyxhat, a, -a * sum_dy, -0.5f * a * t.rstd[at] * sum_dyxhat};
}

FOR_EACH_CPU void sum_rows(const Algebra& t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        double dmean = 0, dvar = 0, dmean_ln = 0, dmean_bn = 0, dvar_in = 0, dvar_bn = 0;
#pragma omp simd reduction(+ : dmean, dvar, dmean_ln, dmean_bn, dvar_in, dvar_bn)
        for (int64_t c = 0; c < t.channels; ++c) {
            const Gradients g = gradients_at(t, n, c);
            const double mean = t.mean[n * t.channels + c];
            dmean += g.dmean;
            dvar += g.dvar;
            dmean_ln += g.dmean * (t.mean_ln[n] - mean);
            dmean_bn += g.dmean * (t.mean_bn[c] - mean);
            dvar_in += g.dvar * t.var[n * t.channels + c];
            dvar_bn += g.dvar * t.var_bn[c];
        }
        t.rows[n] = {dmean, dvar, dmean_ln, dmean_bn, dvar_in, dvar_bn};
    }
}

FOR_EACH_CPU void sum_columns(const Algebra& t, int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += COLUMNS) {
        const int64_t width = std::min(COLUMNS, end - start);
        double dweight[COLUMNS] = {}, dbias[COLUMNS] = {}, dmean[COLUMNS] = {}, dvar[COLUMNS] = {};
        for (int64_t n = 0; n < t.samples; ++n)
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) {
                const Gradients g = gradients_at(t, n, start + c);
                dweight[c] += g.sum_dyxhat;
                dbias[c] += g.sum_dy;
                dmean[c] += g.dmean;
                dvar[c] += g.dvar;
            }
        if (t.dweight) {
            std::copy_n(dweight, width, t.dweight + start);
            std::copy_n(dbias, width, t.dweight + t.channels + start);
        }
        std::copy_n(dmean, width, t.dmean + start);
        std::copy_n(dvar, width, t.dvar + start);
    }
}

FOR_EACH_CPU void write_coefficients(const Algebra& t, int64_t begin, int64_t end) {
    // 1 over the number of pixels that a normalizer pools
    const double in = 1. / t.size, ln = in / t.channels, bn = t.frozen || t.bn < 0 ? 0 : 1 / *t.count;
    const double *dmean_bn = t.shared ? t.shared : t.dmean, *dvar_bn = t.shared ? t.shared + t.channels : t.dvar;
    for (int64_t n = begin; n < end; ++n) {
        const double dmean_ln = t.rows[n].dmean * t.mean_ratios.ln * ln;
        const double dvar_ln = t.rows[n].dvar * t.var_ratios.ln * ln;
        float *b1 = t.coefficients + n * t.channels, *b0 = b1 + t.elements();
#pragma omp simd
        for (int64_t c = 0; c < t.channels; ++c) {
            const Gradients g = gradients_at(t, n, c);
            const double mean = t.mean[n * t.channels + c];
            const double dmean = dmean_bn[c] * t.mean_ratios.bn * bn, dvar = dvar_bn[c] * t.var_ratios.bn * bn;
            b1[c] = 2 * (g.dvar * t.var_ratios.in * in + dvar_ln + dvar);
            // the joint variances also hold the spread of the means
            b0[c] = g.dmean * t.mean_ratios.in * in + dmean_ln - 2 * dvar_ln * (t.mean_ln[n] - mean) + dmean -
                    2 * dvar * (t.mean_bn[c] - mean);
        }
    }
}

void softmax_backward(const Algebra& t, Ratios ratios, Ratios dratios, float* dlogits) {
    const double joint = ratios.in * dratios.in + ratios.ln * dratios.ln + ratios.bn * dratios.bn;
    if (t.in >= 0) dlogits[t.in] = ratios.in * (dratios.in - joint);
    if (t.ln >= 0) dlogits[t.ln] = ratios.ln * (dratios.ln - joint);
    if (t.bn >= 0) dlogits[t.bn] = ratios.bn * (dratios.bn - joint);
}

// joint, coefficients a and s, and, where they are given and not frozen, the running statistics.
void find_coefficients(const Algebra& t) {
    if (t.ln < 0)
        std::fill_n(t.mean_ln, 2 * t.samples, 0.);
    else
        run(pool_rows, t, t.samples, t.elements(), t.threads);
    *t.count = t.bn < 0 ? 0 : t.shared ? t.shared[2 * t.channels] : t.samples * t.size;
    if (t.bn < 0) {
        std::fill_n(t.mean_bn, 2 * t.channels, 0.);
    } else if (t.frozen) {
        std::copy_n(t.running_mean, t.channels, t.mean_bn);
        std::copy_n(t.running_var, t.channels, t.var_bn);
    } else {
        if (t.shared)
            take_shared(t);
        else
            run(pool_columns, t, t.channels, t.elements(), t.threads);
        if (t.running_mean && *t.count > 0) move_statistics(t);
    }
    run(blend, t, t.samples, t.elements(), t.threads);
}

// Coefficients b1, b0 and a, and the gradients of what is small.
void find_gradients(Algebra t) {
    const std::unique_ptr<Row[]> rows(new Row[t.samples]);
    const std::unique_ptr<double[]> columns(new double[2 * t.channels]);
    const std::unique_ptr<float[]> numbers(new float[2 * t.elements()]);
    t.rows = rows.get(), t.dmean = columns.get(), t.dvar = t.dmean + t.channels;
    t.rstd = numbers.get(), t.sum_dyxhat = t.rstd + t.elements(), t.a = t.coefficients + 2 * t.elements();
    run(prepare_gradients, t, t.samples, t.elements(), t.threads);
    run(sum_rows, t, t.samples, t.elements(), t.threads);
    run(sum_columns, t, t.channels, t.elements(), t.threads);
    run(write_coefficients, t, t.samples, t.elements(), t.threads);
    Ratios dmean = {}, dvar = {};
    for (int64_t n = 0; n < t.samples; ++n) {
        dmean.ln += t.rows[n].dmean_ln;
        dmean.bn += t.rows[n].dmean_bn;
        dvar.in += t.rows[n].dvar_in;
        dvar.ln += t.rows[n].dvar * t.var_ln[n];
        dvar.bn += t.rows[n].dvar_bn;
    }
    const int64_t logits = (t.in >= 0) + (t.ln >= 0) + (t.bn >= 0);
    softmax_backward(t, t.mean_ratios, dmean, t.dweight + 2 * t.channels);
    softmax_backward(t, t.var_ratios, dvar, t.dweight + 2 * t.channels + logits);
}

}  // namespace

extern "C" {

// shared of the forward pass, of this process alone.
void sn_pool(const char* block) {
    const Algebra t{Arguments(block)};
    run(share_columns, t, t.channels, t.elements(), t.threads);
    t.shared[2 * t.channels] = t.samples * t.size;
}

void sn_coefficients(const char* block) { find_coefficients(Algebra(Arguments(block))); }

// shared of the backward pass, of this process alone.
void sn_pool_gradients(const char* block) {
    Algebra t{Arguments(block)};
    const std::unique_ptr<float[]> numbers(new float[3 * t.elements()]);
    t.dmean = t.shared, t.dvar = t.shared + t.channels;
    t.rstd = numbers.get(), t.sum_dyxhat = t.rstd + t.elements(), t.a = t.sum_dyxhat + t.elements();
    run(prepare_gradients, t, t.samples, t.elements(), t.threads);
    run(sum_columns, t, t.channels, t.elements(), t.threads);
}

void sn_gradients(const char* block) { find_gradients(Algebra(Arguments(block))); }

// The whole forward pass, of x, the parameters and the statistics, to out, moments and joint.
void sn_forward(const char* block) {
    Arguments t(block);
    const int64_t size = t.elements();
    const std::unique_ptr<float[]> coefficients(new float[2 * size]);
    t.coefficients = coefficients.get();
    float* moments = const_cast<float*>(t.mean);
    sn_sums(t.x, nullptr, nullptr, moments, moments + size, t.samples, t.channels, t.size, t.channels_last, t.bfloat16,
            t.threads);
    find_coefficients(Algebra(t));
    sn_combine(t.x, nullptr, t.out, moments, nullptr, t.coefficients, t.coefficients + size, t.samples, t.channels,
               t.size, t.channels_last, t.bfloat16, t.threads);
}

// The whole backward pass, of dy, x, moments, joint and the parameters, to out and the gradients of the parameters.
void sn_backward(const char* block) {
    Arguments t(block);
    const int64_t size = t.elements();
    const std::unique_ptr<float[]> numbers(new float[5 * size]);
    float* sums = numbers.get();
    t.sum_dy = sums, t.coefficients = sums + 2 * size;
    sn_sums(t.x, t.dy, t.mean, sums, sums + size, t.samples, t.channels, t.size, t.channels_last, t.bfloat16, t.threads);
    find_gradients(Algebra(t));
    sn_combine(t.x, t.dy, t.out, t.mean, t.coefficients + 2 * size, t.coefficients, t.coefficients + size, t.samples,
               t.channels, t.size, t.channels_last, t.bfloat16, t.threads);
}

}  // extern "C"
