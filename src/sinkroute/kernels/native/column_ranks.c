/* For every expert the mean of its finite costs and its rank-th largest cost: what good starting potentials are made of.
 *
 * A column keeps its largest costs so far as a sorted list. Few rows get past the smallest of them, so that nearly all
 * work is one vector comparison per 16 costs.
 */
#include "row.h"

/* ranks: (experts,), each at least 1. lists: room for the sum of the ranks. Costs that are missing count as -inf. */
void column_ranks(const Rows *s, const int64_t *ranks, double *means, double *quantiles, float *lists) {
    int64_t experts = s->experts, padded = PAD(experts);
    float buffer[padded] ALIGNED, least[padded] ALIGNED, counts[padded] ALIGNED;
    double sums[padded] ALIGNED; /* float32 could overflow */
    float *list[experts], *end = lists;
    for (int64_t j = 0; j < experts; ++j) {
        list[j] = end;
        end += ranks[j];
    }
    for (float *x = lists; x < end; ++x) *x = -INFINITY;
    for (int64_t j = 0; j < padded; ++j) least[j] = -INFINITY, sums[j] = counts[j] = 0;
    for (int64_t row = 0; row < s->tokens; ++row) {
        if (s->mask && !s->mask[row * s->mask_stride]) continue;
        const float *c = read_cost(s, row, buffer);
        for (int64_t first = 0; first < padded; first += LANES) {
            int32_t hits = 0;
#pragma omp simd reduction(| : hits)
            for (int64_t lane = 0; lane < LANES; ++lane) {
                float x = c[first + lane];
                int finite = x > -INFINITY && x < INFINITY;
                sums[first + lane] += finite ? x : 0.0;
                counts[first + lane] += finite ? 1.0f : 0.0f;
                hits |= (x > least[first + lane]) << lane;
            }
            for (; hits; hits &= hits - 1) {
                int64_t j = first + __builtin_ctz(hits), at = ranks[j] - 1;
                float x = c[j];
                for (; at > 0 && list[j][at - 1] < x; --at) list[j][at] = list[j][at - 1];
                list[j][at] = x;
                least[j] = list[j][ranks[j] - 1];
            }
        }
    }
    for (int64_t j = 0; j < experts; ++j) {
        means[j] = counts[j] > 0 ? sums[j] / counts[j] : 0;
        quantiles[j] = least[j];
    }
}
