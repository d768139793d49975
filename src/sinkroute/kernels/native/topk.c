/* The k largest of C + g in every row, with their softmax weights at temperature xi. */
#include "row.h"

/* experts_out, weights_out: (tokens, k), descending; ties go to the lower expert. Rows with mask 0: experts 0..k-1,
 * weights 0. normalise 0: the entries of the plan (times the row's mass) instead of weights that sum to 1. */
void topk(const Rows *s, const double *potentials, double reg, int64_t k, int64_t normalise, int64_t *experts_out,
          float *weights_out, int64_t threads) {
    int64_t experts = s->experts, padded = PAD(experts);
    double inv = LOG2E / reg;
    double g[padded] ALIGNED;
    for (int64_t j = 0; j < padded; ++j) g[j] = j < experts ? potentials[j] : 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && s->tokens > 1024)
    {
        float buffer[padded] ALIGNED, y[padded] ALIGNED;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s->tokens; ++row) {
            int64_t *chosen = experts_out + row * k;
            float *weights = weights_out + row * k;
            if (s->mask && !s->mask[row * s->mask_stride]) {
                for (int64_t n = 0; n < k; ++n) chosen[n] = n, weights[n] = 0;
                continue;
            }
            const float *c = read_cost(s, row, buffer);
            /* Relative to the maximum and in float64 first, both: near the top no digit is lost to the size of C or g,
             * and the largest is 0 whatever reg divides it by. */
            double largest = -INFINITY;
#pragma omp simd reduction(max : largest)
            for (int64_t j = 0; j < padded; ++j) largest = c[j] + g[j] > largest ? c[j] + g[j] : largest;
#pragma omp simd
            for (int64_t j = 0; j < padded; ++j) y[j] = (float)(c[j] + g[j] - largest);
            float all = 0;
            if (!normalise)
#pragma omp simd reduction(+ : all)
                for (int64_t j = 0; j < padded; ++j) all += y[j] == -INFINITY ? 0.0f : exp2_of((float)(y[j] * inv));
            float sum = 0, first = 0, best = INFINITY;
            int64_t at = -1;
            for (int64_t n = 0; n < k; ++n) {
                best = next_largest(y, padded, best, at, &at);
                if (n == 0) first = normalise ? best : 0;
                chosen[n] = at < experts ? at : n; /* a row of NaN has no largest */
                float z = (float)((best - first) * inv);
                weights[n] = z > -62.0f ? exp2_of(z) : exp2f(z);
                sum += weights[n];
            }
            float scale = normalise ? 1 / sum : (s->mass ? s->mass[row * s->mass_stride] : 1.0f) / all;
            for (int64_t n = 0; n < k; ++n) weights[n] *= scale;
        }
    }
}
