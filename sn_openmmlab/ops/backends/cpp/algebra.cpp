// The algebra of backends/algebra.py on the CPU, with its names: one call each way, so that small layers do not wait for
// some thirty operations. algebra.py calls the functions at the end.
//
// Moments of maps and coefficients are float32, (samples, channels). Joint moments and all sums are float64, so that
// distances between means do not cancel.

#include <cmath>
#include <memory>

#include "parallel.h"

namespace {

constexpr int64_t COLUMNS = 64;  // channels whose sums over samples are taken side by side

struct Ratios {
    double in, ln, bn;  // 0 for what takes no part
};

struct Row {  // sums over the channels of a sample
    double dmean, dvar;
    double dmean_ln, dmean_bn;  // of dmean times the distance from LN's mean, and from BN's
    double dvar_in, dvar_bn;    // of dvar times the variance
};

struct Arguments {  // as in algebra.py
    int64_t samples, channels, size, threads;
    int64_t in, ln, bn;  // the normalizers' places among the logits, -1 for what takes no part
    int64_t frozen;      // whether the BN moments are constants
    double eps;
    const float *mean, *var, *mean_logits, *var_logits;
    const float *weight, *bias;     // null for 1 and 0
    double* joint;                  // joint moments: means and variances of LN (samples), and of BN (channels)
    float *a, *s;                   // of forward
    const float *sum_dy, *sum_dyx;  // of backward, as all that follows
    float *b1, *b0, *dmean_logits, *dvar_logits, *dweight, *dbias;
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
    double *mean_ln, *var_ln, *mean_bn, *var_bn;
    Row* rows = nullptr;                       // of backward, (samples)
    double *dmean = nullptr, *dvar = nullptr;  // of backward, sums over samples (channels)

    explicit Algebra(const Arguments& given) : Arguments(given) {
        mean_ratios = softmax(given, mean_logits), var_ratios = softmax(given, var_logits);
        mean_ln = joint, var_ln = mean_ln + samples, mean_bn = var_ln + samples, var_bn = mean_bn + channels;
    }
    int64_t elements() const { return samples * channels; }
};

INLINE float shift_at(const Algebra& t, int64_t n, int64_t c) {
    const double mean = t.mean[n * t.channels + c];
    return t.mean_ratios.ln * (mean - t.mean_ln[n]) + t.mean_ratios.bn * (mean - t.mean_bn[c]);
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
        joint /= std::max<int64_t>(t.channels, 1);
#pragma omp simd reduction(+ : joint_var)
        for (int64_t c = 0; c < t.channels; ++c) joint_var += var[c] + (mean[c] - joint) * (mean[c] - joint);
        t.mean_ln[n] = joint;
        t.var_ln[n] = joint_var / std::max<int64_t>(t.channels, 1);
    }
}

FOR_EACH_CPU void pool_columns(const Algebra& t, int64_t begin, int64_t end) {
    const double count = std::max<int64_t>(t.samples, 1);
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

FOR_EACH_CPU void blend(const Algebra& t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        float *a = t.a + n * t.channels, *s = t.s + n * t.channels;
#pragma omp simd
        for (int64_t c = 0; c < t.channels; ++c) {
            a[c] = a_at(t, rstd_at(t, n, c), c);
            s[c] = shift_at(t, n, c) * a[c] + (t.bias ? t.bias[c] : 0);
        }
    }
}

// Backward

struct Gradients {
    float sum_dy, normed, a, dmean, dvar;  // dmean, dvar: -1 and -2 times those w.r.t. the blended moments
};

INLINE Gradients gradients_at(const Algebra& t, int64_t n, int64_t c) {
    const float sum_dy = t.sum_dy[n * t.channels + c], sum_dyx = t.sum_dyx[n * t.channels + c];
    const float rstd = rstd_at(t, n, c), a = a_at(t, rstd, c);
    const float normed = rstd * (sum_dyx + shift_at(t, n, c) * sum_dy);
    return {sum_dy, normed, a, a * sum_dy, a * rstd * normed};
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
            dmean_ln += g.dmean * (mean - t.mean_ln[n]);
            dmean_bn += g.dmean * (mean - t.mean_bn[c]);
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
                dweight[c] += g.normed;
                dbias[c] += g.sum_dy;
                dmean[c] += g.dmean;
                dvar[c] += g.dvar;
            }
        std::copy_n(dweight, width, t.dweight + start);
        std::copy_n(dbias, width, t.dbias + start);
        std::copy_n(dmean, width, t.dmean + start);
        std::copy_n(dvar, width, t.dvar + start);
    }
}

FOR_EACH_CPU void coefficients(const Algebra& t, int64_t begin, int64_t end) {
    // -1 over the number of pixels that a normalizer pools
    const double in = -1. / std::max<int64_t>(t.size, 1), ln = in / std::max<int64_t>(t.channels, 1);
    const double bn = t.frozen ? 0 : in / t.samples;
    for (int64_t n = begin; n < end; ++n) {
        const double dmean_ln = t.rows[n].dmean * t.mean_ratios.ln * ln;
        const double dvar_ln = t.rows[n].dvar * t.var_ratios.ln * ln;
        float *a = t.a + n * t.channels, *b1 = t.b1 + n * t.channels, *b0 = t.b0 + n * t.channels;
#pragma omp simd
        for (int64_t c = 0; c < t.channels; ++c) {
            const Gradients g = gradients_at(t, n, c);
            const double mean = t.mean[n * t.channels + c];
            const double dmean_bn = t.dmean[c] * t.mean_ratios.bn * bn, dvar_bn = t.dvar[c] * t.var_ratios.bn * bn;
            a[c] = g.a;
            b1[c] = g.dvar * t.var_ratios.in * in + dvar_ln + dvar_bn;
            // the joint variances also hold the spread of the means
            b0[c] = g.dmean * t.mean_ratios.in * in + dmean_ln + dvar_ln * (mean - t.mean_ln[n]) + dmean_bn +
                    dvar_bn * (mean - t.mean_bn[c]);
        }
    }
}

void softmax_backward(const Algebra& t, Ratios ratios, Ratios dratios, double scale, float* dlogits) {
    const double joint = ratios.in * dratios.in + ratios.ln * dratios.ln + ratios.bn * dratios.bn;
    if (t.in >= 0) dlogits[t.in] = scale * ratios.in * (dratios.in - joint);
    if (t.ln >= 0) dlogits[t.ln] = scale * ratios.ln * (dratios.ln - joint);
    if (t.bn >= 0) dlogits[t.bn] = scale * ratios.bn * (dratios.bn - joint);
}

}  // namespace

extern "C" {

// a and s. Joint moments are written, but for BN's where frozen.
void sn_forward(const Arguments& given) {
    const Algebra t(given);
    if (t.ln < 0)
        std::fill_n(t.mean_ln, 2 * t.samples, 0.);
    else
        run(pool_rows, t, t.samples, t.elements(), t.threads);
    if (t.bn < 0)
        std::fill_n(t.mean_bn, 2 * t.channels, 0.);
    else if (!t.frozen)
        run(pool_columns, t, t.channels, t.elements(), t.threads);
    run(blend, t, t.samples, t.elements(), t.threads);
}

// a, b1, b0, and the gradients of what is small.
void sn_backward(const Arguments& given) {
    Algebra t(given);
    const std::unique_ptr<Row[]> rows(new Row[t.samples]);
    const std::unique_ptr<double[]> columns(new double[2 * t.channels]);
    t.rows = rows.get(), t.dmean = columns.get(), t.dvar = t.dmean + t.channels;
    run(sum_rows, t, t.samples, t.elements(), t.threads);
    run(sum_columns, t, t.channels, t.elements(), t.threads);
    run(coefficients, t, t.samples, t.elements(), t.threads);
    Ratios dmean = {}, dvar = {};
    for (int64_t n = 0; n < t.samples; ++n) {
        dmean.ln += t.rows[n].dmean_ln;
        dmean.bn += t.rows[n].dmean_bn;
        dvar.in += t.rows[n].dvar_in;
        dvar.ln += t.rows[n].dvar * t.var_ln[n];
        dvar.bn += t.rows[n].dvar_bn;
    }
    softmax_backward(t, t.mean_ratios, dmean, 1, t.dmean_logits);
    softmax_backward(t, t.var_ratios, dvar, -0.5, t.dvar_logits);
}

}  // extern "C"
