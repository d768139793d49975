/* What the top-k of C + g gives to every expert.
 *
 * C + g is rounded to float32: a caller for whom small differences matter shifts g so that it is near 0 there.
 */
#include "row.h"

/* chosen, margin: (tokens, k) out, the k largest of C + bias in every row and their lead over the next; rows with mask
 * 0 get experts 0..k-1. counts: (experts,) out, the rows that have each expert. nearness: (experts,) out, the geometric
 * mean of the lead of the k-th, over the rows where the expert is the k-th or the next and not tied; 0 without any. */
void choose(const Scores *s, const float *bias, int64_t k, int64_t *chosen, float *margin, int64_t *counts,
            float *nearness, int64_t threads) {
    int64_t experts = s->experts, padded = PAD(experts);
    float g[padded] ALIGNED;
    for (int64_t j = 0; j < padded; ++j) g[j] = j < experts ? bias[j] : 0;
    int64_t seen[experts], bits[experts];
    memset(seen, 0, sizeof seen);
    memset(bits, 0, sizeof bits);
    memset(counts, 0, experts * sizeof(int64_t));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float buffer[padded] ALIGNED, y[padded] ALIGNED;
        int64_t own_counts[padded], own_seen[padded], own_bits[padded];
        memset(own_counts, 0, sizeof own_counts);
        memset(own_seen, 0, sizeof own_seen);
        memset(own_bits, 0, sizeof own_bits);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s->tokens; ++row) {
            int64_t *out = chosen + row * k, next = 0;
            if (s->mask && !s->mask[row * s->mask_stride]) {
                for (int64_t n = 0; n < k; ++n) out[n] = n, margin[row * k + n] = 0;
                continue;
            }
            const float *c = read_cost(s, row, buffer);
#pragma omp simd
            for (int64_t j = 0; j < padded; ++j) y[j] = c[j] + g[j];
            float value[k], rest = INFINITY;
            int64_t at = -1;
            for (int64_t n = 0; n < k; ++n) {
                value[n] = rest = next_largest(y, padded, rest, at, &at);
                out[n] = at;
                ++own_counts[at];
            }
            rest = k < experts ? next_largest(y, padded, rest, at, &next) : -INFINITY;
            for (int64_t n = 0; n < k; ++n) margin[row * k + n] = value[n] - rest;
            union { float f; int32_t i; } gap = {margin[row * k + k - 1]};
            if (!(gap.f > 0 && gap.f < INFINITY)) continue; /* a tie says nothing about the scale */
            /* The bits of a positive float, read as an integer, are its logarithm, near enough. */
            own_bits[out[k - 1]] += gap.i, own_bits[next] += gap.i;
            ++own_seen[out[k - 1]], ++own_seen[next];
        }
#pragma omp critical
        for (int64_t j = 0; j < experts; ++j) {
            counts[j] += own_counts[j];
            seen[j] += own_seen[j];
            bits[j] += own_bits[j];
        }
    }
    for (int64_t j = 0; j < experts; ++j) {
        union { float f; int32_t i; } mean = {0};
        if (seen[j]) mean.i = (int32_t)(bits[j] / seen[j]);
        nearness[j] = mean.f;
    }
}
