/* One pass over the logits: with p_ij = softmax_j((C_ij + g_j) / xi) and the mass m_i of row i,
 *
 *     sums_j = sum_i m_i p_ij          squares_j = sum_i m_i p_ij^2
 *
 * and nothing else is written. The exponential is float32. The shift (C + g - max) / xi is float32 too, which is off by
 * about 1.2e-7 |C + g| / xi, or float64, where neither the size of the logits nor that of the potentials costs
 * digits, at a quarter more time. Rows are summed in float32 over BLOCK rows, in
 * float64 over a chunk, then over the chunks in their order: the sums do not depend on the number of threads.
 */
#include "row.h"

#define BLOCK 16
#define CHUNKS_AT_MOST 256
#define CHUNK_AT_LEAST 512

static int64_t chunk_length(int64_t tokens) {
    int64_t length = (tokens + CHUNKS_AT_MOST - 1) / CHUNKS_AT_MOST;
    return length > CHUNK_AT_LEAST ? length : CHUNK_AT_LEAST;
}

/* How many float64 `column_sums` wants as workspace. */
int64_t column_sums_workspace(int64_t tokens, int64_t experts) {
    int64_t length = chunk_length(tokens);
    return (tokens + length - 1) / length * 2 * PAD(experts);
}

typedef struct {
    double inv;          /* log2(e) / xi */
    const double *shift; /* g_j inv */
    const float *g, *narrow_shift;
    double narrow_below; /* rows whose maximum, in log2, is smaller than this are shifted in float32 */
} Potentials;

/* The same however large logits and potentials are: the maximum is taken of the very numbers that it is taken off. */
static float careful_exponentials(const float *c, const Potentials *p, int64_t padded, float *e) {
    double x[padded], top = -INFINITY;
    float sum = 0;
    for (int64_t j = 0; j < padded; ++j) {
        x[j] = c[j] * p->inv + p->shift[j];
        top = x[j] > top ? x[j] : top;
    }
    for (int64_t j = 0; j < padded; ++j) sum += e[j] = exp2_of((float)(x[j] - top));
    return sum;
}

/* Into `sums` and `squares`, (padded,) each, from rows first to last. */
static void sum_chunk(const Rows *s, int64_t first, int64_t last, const Potentials *p, double *sums,
                      double *squares) {
    int64_t padded = PAD(s->experts);
    float buffer[padded] ALIGNED, e[padded] ALIGNED, block[padded] ALIGNED, block_squares[padded] ALIGNED;
    for (int64_t j = 0; j < padded; ++j) sums[j] = squares[j] = 0;
    for (int64_t start = first; start < last; start += BLOCK) {
        int64_t stop = start + BLOCK < last ? start + BLOCK : last;
        for (int64_t j = 0; j < padded; ++j) block[j] = block_squares[j] = 0;
        for (int64_t row = start; row < stop; ++row) {
            if (s->mask && !s->mask[row * s->mask_stride]) continue;
            const float *c = read_cost(s, row, buffer);
            double top = shifted_max(c, p->g, padded) * p->inv;
            float sum = fabs(top) < p->narrow_below
                            ? narrow_exponentials(c, p->narrow_shift, (float)p->inv, (float)top, padded, e)
                            : exponentials(c, p->shift, p->inv, top, padded, e);
            /* Not about 1 or more: float32 was too coarse for the maximum. */
            if (!(sum > 0.25f && sum < 1e30f)) sum = careful_exponentials(c, p, padded, e);
            float mass = s->mass ? s->mass[row * s->mass_stride] : 1.0f;
            accumulate(e, 1 / sum, mass, padded, block, block_squares);
        }
#pragma omp simd
        for (int64_t j = 0; j < padded; ++j) {
            sums[j] += block[j];
            squares[j] += block_squares[j];
        }
    }
}

/* potentials: (experts,), -inf for an expert without mass. precision: what an entry near its row's maximum may be off
 * by, relatively, for the sake of speed. out: (2, experts), the sums and the squares; NaN where a
 * logit is NaN or +inf, or a whole row is -inf. */
void column_sums(const Rows *s, const double *potentials, double reg, double precision, double *out,
                 double *workspace, int64_t threads) {
    int64_t experts = s->experts, padded = PAD(experts), length = chunk_length(s->tokens);
    int64_t chunks = (s->tokens + length - 1) / length;
    double shift[padded] ALIGNED;
    float g[padded] ALIGNED, narrow_shift[padded] ALIGNED;
    Potentials p = {LOG2E / reg, shift, g, narrow_shift, precision * (LOG2E / 1.2e-7)};
    for (int64_t j = 0; j < padded; ++j) {
        g[j] = j < experts ? (float)potentials[j] : 0;
        shift[j] = j < experts ? potentials[j] * p.inv : 0;
        narrow_shift[j] = (float)shift[j];
        if (isfinite(shift[j]) && fabs(shift[j]) >= p.narrow_below) p.narrow_below = 0;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && chunks > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t first = chunk * length, last = first + length < s->tokens ? first + length : s->tokens;
        double *sums = workspace + chunk * 2 * padded;
        sum_chunk(s, first, last, &p, sums, sums + padded);
    }
    for (int64_t j = 0; j < 2 * experts; ++j) out[j] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double *sums = workspace + chunk * 2 * padded;
        for (int64_t j = 0; j < experts; ++j) {
            out[j] += sums[j];
            out[experts + j] += sums[padded + j];
        }
    }
}
