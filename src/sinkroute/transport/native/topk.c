/* The k largest of C + g in every row, with their softmax weights at temperature xi. */
#include "row.h"

/* experts_out, weights_out: (tokens, k), descending; ties go to the lower expert. Rows with mask 0: experts 0..k-1,
 * weights 0. normalise 0: the entries of the plan (times the row's mass) instead of weights that sum to 1. */
void topk(const Scores *s, const double *potentials, double reg, int64_t k, int64_t normalise, int64_t *experts_out,
          float *weights_out, int64_t threads) {
    int64_t experts = s->experts, padded = PAD(experts);
    double inv = LOG2E / reg;
    float g[padded] ALIGNED;
    for (int64_t j = 0; j < padded; ++j) g[j] = j < experts ? (float)potentials[j] : 0;
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
            float largest = shifted_max(c, g, padded);
            /* Relative to the maximum and in float64 first: near the top no digit is lost to the size of C or g. */
            for (int64_t j = 0; j < experts; ++j) y[j] = (float)(c[j] + (potentials[j] - largest));
            for (int64_t j = experts; j < padded; ++j) y[j] = -INFINITY;
            float all = 0;
            if (!normalise)
#pragma omp simd reduction(+ : all)
                for (int64_t j = 0; j < padded; ++j) all += y[j] == -INFINITY ? 0.0f : exp2_of((float)(y[j] * inv));
            float sum = 0, first = 0;
            for (int64_t n = 0; n < k; ++n) {
                float best = row_max(y, padded);
                int64_t at = 0;
                for (int64_t j = 0; j < padded; j += LANES) {
                    int32_t hit = 0;
#pragma omp simd reduction(| : hit)
                    for (int64_t lane = 0; lane < LANES; ++lane) hit |= (y[j + lane] == best) << lane;
                    if (hit) {
                        at = j + __builtin_ctz(hit);
                        break;
                    }
                }
                if (n == 0) first = best;
                chosen[n] = at;
                weights[n] = best == -INFINITY ? 0 : exp2f((float)((best - (normalise ? first : 0)) * inv));
                sum += weights[n];
                y[at] = -NAN; /* never equal to anything, never the maximum: not chosen twice, even among -inf */
            }
            float scale = normalise ? 1 / sum : (s->mass ? s->mass[row * s->mass_stride] : 1.0f) / all;
            for (int64_t n = 0; n < k; ++n) weights[n] *= scale;
        }
    }
}
