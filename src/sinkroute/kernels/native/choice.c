/* What the top-k of C + g gives to every expert, and how far off each g is.
 *
 * C + g is rounded to float32: a caller for whom small differences matter shifts g so that it is near 0 there.
 */
#include "largest.h"

#define NEAREST 16 /* a power of 2 is not needed, whole vectors are not either */

typedef struct {
    float least[NEAREST]; /* ascending; what is not known is the limit */
} Nearest;

static inline void insert(Nearest *a, float distance) {
    int64_t n = NEAREST - 1;
    if (!(distance < a->least[n])) return;
    for (; n > 0 && a->least[n - 1] > distance; --n) a->least[n] = a->least[n - 1];
    a->least[n] = distance;
}

/* Where between the `wanted`-th and the next smallest distance; in proportion beyond what is known. */
static double between(const Nearest *a, int64_t wanted) {
    if (wanted < NEAREST) return 0.5 * ((double)a->least[wanted - 1] + a->least[wanted]);
    return a->least[NEAREST - 1] * ((double)wanted / NEAREST);
}

/* chosen: (tokens, k) out, the k largest of C + bias in every row, descending, of equal ones the lower expert first;
 * rows with mask 0 get experts 0..k-1. counts: (experts,) out, the rows that have each expert. near: (experts,) out,
 * the NEAREST-th distance of a token from the decision about the expert, of those on the side that matters. step:
 * (experts,) out, what to add to the bias of an expert so that `target` tokens have it if the others stay as they
 * are; 0 where that is not known. limit: (experts,) distances that need not be looked at, or NULL. workspace:
 * (1 + threads, 2, experts, NEAREST). */
void choose(const Rows *s, const float *bias, int64_t k, const double *target, const float *limit, int64_t *chosen,
            int64_t *counts, double *step, float *near, float *workspace, int64_t threads) {
    int64_t experts = s->experts, padded = PAD(experts), more = k < experts, started = 0;
    float g[padded] ALIGNED;
    for (int64_t j = 0; j < padded; ++j) g[j] = j < experts ? bias[j] : 0;
    memset(counts, 0, experts * sizeof(int64_t));
    Nearest *inside = (Nearest *)workspace, *outside = inside + experts;
    for (int64_t j = 0; j < 2 * experts; ++j)
        for (int64_t n = 0; n < NEAREST; ++n) inside[j].least[n] = limit ? limit[j % experts] : INFINITY;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float buffer[padded] ALIGNED, y[padded] ALIGNED, reach[padded] ALIGNED, kept[padded + 2 * LANES];
        float kept_bias[padded + 2 * LANES];
        uint32_t offsets[padded + 2 * LANES];
        int32_t places[k + 1 + LANES];
        int64_t own_counts[padded];
        memset(own_counts, 0, sizeof own_counts);
        int64_t number;
#pragma omp atomic capture
        number = ++started;
        Nearest *in = inside + 2 * experts * number, *out = in + experts;
        memcpy(in, inside, 2 * experts * sizeof(Nearest));
        for (int64_t j = 0; j < padded; ++j) reach[j] = j < experts ? out[j].least[NEAREST - 1] : 0;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s->tokens; ++row) {
            int64_t *to = chosen + row * k;
            if (s->mask && !s->mask[row * s->mask_stride]) {
                for (int64_t n = 0; n < k; ++n) to[n] = n;
                continue;
            }
            const float *c = read_cost(s, row, buffer);
            float bound = k + more > LANES ? -INFINITY : kth_bound(c, g, 0, experts, k + more);
            int64_t count = keep(c, g, 0, bound, experts, 0, offsets, kept, kept_bias);
            for (int64_t n = 0; n < count; ++n) kept[n] += kept_bias[n];
            pick(kept, count, k + more, places);
            for (int64_t n = 0; n < k; ++n) ++own_counts[to[n] = offsets[places[n]]];
            if (!more) continue;
            float kth = kept[places[k - 1]], next = kept[places[k]];
            for (int64_t n = 0; n < k; ++n) insert(in + to[n], kept[places[n]] - next);
#pragma omp simd
            for (int64_t j = 0; j < padded; ++j) y[j] = kth - (c[j] + g[j]); /* below 0, or a tie, for the chosen */
            for (int64_t n = 0; n < k; ++n) y[to[n]] = INFINITY;
            for (int64_t j = 0; j < padded; j += LANES) {
                int32_t hits = 0;
#pragma omp simd reduction(| : hits)
                for (int64_t lane = 0; lane < LANES; ++lane) hits |= (y[j + lane] < reach[j + lane]) << lane;
                for (; hits; hits &= hits - 1) {
                    int64_t at = j + __builtin_ctz(hits);
                    insert(out + at, y[at]);
                    reach[at] = out[at].least[NEAREST - 1];
                }
            }
        }
#pragma omp critical
        for (int64_t j = 0; j < experts; ++j) {
            counts[j] += own_counts[j];
            for (int64_t n = 0; n < NEAREST; ++n) {
                insert(inside + j, in[j].least[n]);
                insert(outside + j, out[j].least[n]);
            }
        }
    }
    for (int64_t j = 0; j < experts; ++j) {
        int64_t surplus = counts[j] - (int64_t)llrint(target[j]);
        const Nearest *side = surplus > 0 ? inside + j : outside + j;
        double by = surplus ? between(side, surplus > 0 ? surplus : -surplus) : 0;
        step[j] = by < INFINITY ? (surplus > 0 ? -by : by) : 0;
        near[j] = side->least[NEAREST - 1];
    }
}
