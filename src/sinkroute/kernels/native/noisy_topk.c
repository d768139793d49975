/* The k largest values of every row, with noise on them or without; each value is read once or twice, nothing of the
 * size of the rows is written.
 *
 *     y_j = (x_j + std n_j) + bias_j,    |n_j| <= NOISE_BOUND, so that with reach = std NOISE_BOUND
 *     (x_j - reach) + bias_j <= y_j <= (x_j + reach) + bias_j,
 *
 * rounded as it is, as rounding keeps the order. The least of k lower bounds is therefore one of the k-th largest y,
 * and what cannot get there need not be looked at: a few candidates are left, and noise is drawn for them only. Lower
 * bounds of k places come from one sweep: the k-th largest of the maxima of LANES interleaved parts of the row.
 *
 * `edge_topk` asks for one more without noise: the best that is not chosen, and how far below the last chosen it is.
 */
#include "largest.h"
#include "noise.h"

#define AT_ONCE 4096 /* values in a block of rows, whose noise is drawn together: whole vectors of it */

/* Rows that hold NaN may leave less than k candidates: add what was left out, as -inf. */
static int64_t fill(const float *x, const float *bias, float by, float bound, int64_t experts, uint32_t first,
                    uint32_t *offsets, float *kept, float *kept_bias, int64_t count) {
    for (int64_t j = 0; j < experts; ++j)
        if (!(SHIFTED(j) >= bound))
            kept[count] = -INFINITY, kept_bias[count] = 0, offsets[count++] = first + (uint32_t)j;
    return count;
}

/* `picked`: k, or k + 1 with an edge. */
static inline void rows(const float *values, int64_t tokens, int64_t experts, int64_t stride, const float *bias,
                        int64_t k, float std, int64_t seed, int64_t row, int64_t *experts_out, float *noise_out,
                        int64_t picked, int32_t *next_out, double *margin_out) {
    int64_t most = AT_ONCE / experts, last, starts[AT_ONCE + 1];
    most = most < 1 ? 1 : most;
    last = row + most < tokens ? row + most : tokens;
    int64_t room = most * experts + 2 * LANES; /* whole vectors are written, of noise two */
    float kept[room], kept_bias[room], noise[room], scaled[room], reach = std * NOISE_BOUND;
    uint32_t offsets[room];
    int32_t places[picked + LANES];
    starts[0] = 0;
    for (int64_t r = row; r < last; ++r) {
        const float *x = values + r * stride;
        int64_t count = starts[r - row];
        uint32_t first = (uint32_t)((r - row) * experts);
        float bound = picked > LANES ? -INFINITY : kth_bound(x, bias, -reach, experts, picked);
        float *biases = kept_bias + (bias ? count : 0);
        int64_t own = keep(x, bias, reach, bound, experts, first, offsets + count, kept + count, biases);
        if (own < picked) own = fill(x, bias, reach, bound, experts, first, offsets + count, kept + count, biases, own);
        starts[r - row + 1] = count + own;
    }
    int64_t count = starts[last - row];
    if (noise_out) {
        normal_at(seed, row * experts, offsets, count, noise);
        for (int64_t i = 0; i < count; ++i) scaled[i] = std * noise[i];
        /* Through memory, or compilers fuse product and sum, and torch does not. */
        __asm__ volatile("" : : : "memory");
        for (int64_t i = 0; i < count; ++i) kept[i] += scaled[i];
    }
    if (bias)
        for (int64_t i = 0; i < count; ++i) kept[i] += kept_bias[i];
    for (int64_t r = row; r < last; ++r) {
        int64_t start = starts[r - row], first = (r - row) * experts;
        pick(kept + start, starts[r - row + 1] - start, picked, places);
        for (int64_t n = 0; n < k; ++n) {
            experts_out[r * k + n] = offsets[start + places[n]] - first;
            if (noise_out) noise_out[r * k + n] = noise[start + places[n]];
        }
        if (picked > k) {
            next_out[r] = (int32_t)(offsets[start + places[k]] - first);
            double margin = (double)kept[start + places[k - 1]] - (double)kept[start + places[k]];
            margin_out[r] = margin < INFINITY ? margin : INFINITY; /* NaN too */
        }
    }
}

/* values: rows `stride` apart. bias: (experts,) or NULL. experts_out: (tokens, k), descending, of equal ones the
 * lower first. noise_out: (tokens, k), their n_j, the numbers of `seed` at the places of a (tokens, experts) matrix;
 * NULL: no noise, std is 0. */
void noisy_topk(const float *values, int64_t tokens, int64_t experts, int64_t stride, const float *bias, int64_t k,
                float std, int64_t seed, int64_t *experts_out, float *noise_out, int64_t threads) {
    int64_t most = AT_ONCE / experts;
    most = most < 1 ? 1 : most;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < tokens; row += most) {
        if (bias)
            rows(values, tokens, experts, stride, bias, k, std, seed, row, experts_out, noise_out, k, NULL, NULL);
        else
            rows(values, tokens, experts, stride, NULL, k, std, seed, row, experts_out, noise_out, k, NULL, NULL);
    }
}

/* The same without noise, for k < experts. next_out: (tokens,), the (k + 1)-th expert. margin_out: (tokens,), how far
 * its value is below the k-th, INFINITY where that is not a number. */
void edge_topk(const float *values, int64_t tokens, int64_t experts, int64_t stride, const float *bias, int64_t k,
               int64_t *experts_out, int32_t *next_out, double *margin_out, int64_t threads) {
    int64_t most = AT_ONCE / experts, more = k + 1;
    most = most < 1 ? 1 : most;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < tokens; row += most) {
        if (bias)
            rows(values, tokens, experts, stride, bias, k, 0, 0, row, experts_out, NULL, more, next_out, margin_out);
        else
            rows(values, tokens, experts, stride, NULL, k, 0, 0, row, experts_out, NULL, more, next_out, margin_out);
    }
}
