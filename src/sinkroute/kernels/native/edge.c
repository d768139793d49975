/* Which experts the tokens are about that could change their choice most easily: an order statistic of the margins, and
 * counts of those below it. */
#include "row.h"

#define SAMPLED 64 /* values of which a range is guessed */
#define APART 8    /* of them, that the range reaches to each side: two standard deviations in the middle */

static inline void sort(double *x, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
        double value = x[i];
        int64_t at = i;
        for (; at > 0 && x[at - 1] > value; --at) x[at] = x[at - 1];
        x[at] = value;
    }
}

/* The value that would be at `at` if the n in x, which are lost, were sorted. Every round guesses a range from a sample,
 * counts what is below it and in it, and keeps the part that is known to hold the value: some O(n) in all. */
static double at_rank(double *x, int64_t n, int64_t at) {
    int64_t apart = APART;
    while (n > SAMPLED) {
        double sample[SAMPLED];
        for (int64_t i = 0; i < SAMPLED; ++i) sample[i] = x[i * n / SAMPLED];
        sort(sample, SAMPLED);
        int64_t near = at * SAMPLED / n, below = 0, within = 0, kept = 0, before = n;
        double low = near < apart ? -INFINITY : sample[near - apart];
        double high = near + apart < SAMPLED ? sample[near + apart] : INFINITY;
#pragma omp simd reduction(+ : below, within)
        for (int64_t i = 0; i < n; ++i) {
            below += x[i] < low;
            within += (x[i] >= low) & (x[i] <= high);
        }
        if (at < below) {
            high = low, low = -INFINITY;
            for (int64_t i = 0; i < n; ++i) {
                double value = x[i];
                x[kept] = value;
                kept += value < high;
            }
        } else if (at < below + within) {
            if (low == high) return low;
            for (int64_t i = 0; i < n; ++i) {
                double value = x[i];
                x[kept] = value;
                kept += (value >= low) & (value <= high);
            }
            at -= below;
        } else {
            for (int64_t i = 0; i < n; ++i) {
                double value = x[i];
                x[kept] = value;
                kept += value > high;
            }
            at -= below + within;
        }
        n = kept;
        /* Where many are equal a range may hold all. One value of them does not: the next round ends, or leaves it out. */
        apart = 2 * n > before ? 0 : APART;
    }
    sort(x, n);
    return x[at];
}

/* margins: (tokens,), INFINITY where there is none. last: (tokens, k) of which the last column is read. next: (tokens,).
 * counts: (experts,), zeros, gets for every token whose margin is below the width 1 at its last and 1 at its next
 * expert. room: (tokens,). The width comes back: the margin at `rank`, at least `least`; 1 where it is infinite. */
double edge(const double *margins, const int64_t *last, const int32_t *next, int64_t tokens, int64_t k, int64_t rank,
            double least, double *room, double *counts) {
    memcpy(room, margins, (size_t)tokens * sizeof(double));
    double width = at_rank(room, tokens, rank);
    width = width < least ? least : width;
    width = width < INFINITY ? width : 1;
    for (int64_t t = 0; t < tokens; ++t) {
        double is_near = margins[t] < width;
        counts[last[t * k + k - 1]] += is_near;
        counts[next[t]] += is_near;
    }
    return width;
}
