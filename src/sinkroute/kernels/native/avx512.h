/* The loops of row.h in AVX-512 intrinsics, for the same results in half to two thirds of the time: what a compiler
 * makes of those loops keeps remainders that never run and does not know `scalef`. Only row.h includes this file. */
#ifndef SINKROUTE_AVX512_H
#define SINKROUTE_AVX512_H

#include <immintrin.h>

/* See exp2_of; `scalef` needs no upper limit. */
static inline __m512 exp2_of_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-63.0f), x); /* in this order NaN comes through */
    __m512 rounded = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, rounded), p = _mm512_set1_ps(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, rounded);
}

static inline float row_max(const float *x, int64_t padded) {
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < padded; j += 16) largest = _mm512_max_ps(_mm512_loadu_ps(x + j), largest);
    return _mm512_reduce_max_ps(largest);
}

static inline float shifted_max(const float *x, const float *g, int64_t padded) {
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < padded; j += 16)
        largest = _mm512_max_ps(_mm512_add_ps(_mm512_loadu_ps(x + j), _mm512_load_ps(g + j)), largest);
    return _mm512_reduce_max_ps(largest);
}

static inline float next_largest(const float *y, int64_t padded, float before, int64_t before_at, int64_t *at) {
    __m512 largest = _mm512_set1_ps(-INFINITY), before_16 = _mm512_set1_ps(before);
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i found = _mm512_set1_epi32(INT32_MAX), before_at_16 = _mm512_set1_epi32((int32_t)before_at);
    if (padded == 16) { /* at most 16 experts: the place is that of a bit */
        __m512 x = _mm512_load_ps(y);
        __mmask16 tied = _mm512_cmp_ps_mask(x, before_16, _CMP_EQ_OQ) & _mm512_cmpgt_epi32_mask(index, before_at_16);
        __mmask16 after = _mm512_cmp_ps_mask(x, before_16, _CMP_LT_OQ) | tied;
        float top = _mm512_mask_reduce_max_ps(after, x);
        *at = __builtin_ctz(_mm512_mask_cmp_ps_mask(after, x, _mm512_set1_ps(top), _CMP_EQ_OQ) | 0x8000);
        return top;
    }
    for (int64_t j = 0; j < padded; j += 16) {
        __m512 x = _mm512_load_ps(y + j);
        __mmask16 tied = _mm512_cmp_ps_mask(x, before_16, _CMP_EQ_OQ) & _mm512_cmpgt_epi32_mask(index, before_at_16);
        __mmask16 after = _mm512_cmp_ps_mask(x, before_16, _CMP_LT_OQ) | tied;
        __mmask16 better = _mm512_mask_cmp_ps_mask(after, x, largest, _CMP_GT_OQ);
        largest = _mm512_mask_mov_ps(largest, better, x);
        found = _mm512_mask_mov_epi32(found, better, index);
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
    float top = _mm512_reduce_max_ps(largest);
    __mmask16 best = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(top), _CMP_EQ_OQ);
    *at = _mm512_mask_reduce_min_epi32(best, found);
    if (*at == INT32_MAX) /* only -inf is left */
        for (*at = before > -INFINITY ? 0 : before_at + 1; *at < padded - 1 && y[*at] != -INFINITY;) ++*at;
    return top;
}

static inline float softmax_numerators(const float *x, float top, int64_t padded, float *out) {
    __m512 sum = _mm512_setzero_ps(), least = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < padded; j += 16) {
        __m512 logit = _mm512_loadu_ps(x + j), above = _mm512_sub_ps(logit, _mm512_set1_ps(top));
        __m512 e = exp2_of_16(_mm512_mul_ps(above, _mm512_set1_ps((float)LOG2E)));
        sum = _mm512_add_ps(sum, e);
        _mm512_store_ps(out + j, _mm512_mask_mov_ps(e, _mm512_cmp_ps_mask(logit, least, _CMP_EQ_OQ), least));
    }
    return _mm512_reduce_add_ps(sum);
}

static inline float exponentials(const float *c, const double *shift, double inv, double top, int64_t padded,
                                 float *e) {
    __m512 sum = _mm512_setzero_ps();
    __m512d inv_8 = _mm512_set1_pd(inv), top_8 = _mm512_set1_pd(top);
    for (int64_t j = 0; j < padded; j += 16) {
        __m512d low = _mm512_cvtps_pd(_mm256_loadu_ps(c + j)), high = _mm512_cvtps_pd(_mm256_loadu_ps(c + j + 8));
        low = _mm512_fmadd_pd(low, inv_8, _mm512_sub_pd(_mm512_load_pd(shift + j), top_8));
        high = _mm512_fmadd_pd(high, inv_8, _mm512_sub_pd(_mm512_load_pd(shift + j + 8), top_8));
        __m512d both = _mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)));
        both = _mm512_insertf64x4(both, _mm256_castps_pd(_mm512_cvtpd_ps(high)), 1);
        __m512 value = exp2_of_16(_mm512_castpd_ps(both));
        _mm512_store_ps(e + j, value);
        sum = _mm512_add_ps(sum, value);
    }
    return _mm512_reduce_add_ps(sum);
}

static inline float narrow_exponentials(const float *c, const float *shift, float inv, float top, int64_t padded,
                                        float *e) {
    __m512 sum = _mm512_setzero_ps(), inv_16 = _mm512_set1_ps(inv), top_16 = _mm512_set1_ps(top);
    for (int64_t j = 0; j < padded; j += 16) {
        __m512 rest = _mm512_sub_ps(_mm512_load_ps(shift + j), top_16);
        __m512 value = exp2_of_16(_mm512_fmadd_ps(_mm512_loadu_ps(c + j), inv_16, rest));
        _mm512_store_ps(e + j, value);
        sum = _mm512_add_ps(sum, value);
    }
    return _mm512_reduce_add_ps(sum);
}

static inline void accumulate(const float *e, float scale, float mass, int64_t padded, float *block, float *squares) {
    __m512 scale_16 = _mm512_set1_ps(scale), mass_16 = _mm512_set1_ps(mass);
    for (int64_t j = 0; j < padded; j += 16) {
        __m512 p = _mm512_mul_ps(_mm512_load_ps(e + j), scale_16), share = _mm512_mul_ps(p, mass_16);
        _mm512_store_ps(block + j, _mm512_add_ps(_mm512_load_ps(block + j), share));
        _mm512_store_ps(squares + j, _mm512_fmadd_ps(share, p, _mm512_load_ps(squares + j)));
    }
}

#endif
