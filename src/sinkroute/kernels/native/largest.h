/* The k largest of a row x + by + bias, in one or two sweeps: a bound that the k-th largest reaches, what is not
 * below it, and the order of that. */
#ifndef SINKROUTE_LARGEST_H
#define SINKROUTE_LARGEST_H

#include "row.h"

/* x_j + by + bias_j. */
#define SHIFTED(j) ((x[j] + by) + (bias ? bias[j] : 0))

#ifdef __AVX512F__
static inline __m512 shifted(const float *x, const float *bias, float by, int64_t j, __mmask16 mask) {
    __m512 y = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, x + j), _mm512_set1_ps(by));
    return bias ? _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, bias + j)) : y;
}

#define IOTA _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define MASK(left) ((left) < LANES ? (__mmask16)((1u << (left)) - 1) : (__mmask16)0xffff)

/* One step of a bitonic sorting network: lane i meets lane i ^ distance; `larger` are the lanes that keep the larger. */
#define MEET(partner, larger) \
    met = partner, most = _mm512_mask_max_ps(_mm512_min_ps(most, met), larger, most, met);
#define MEET_1(larger) MEET(_mm512_permute_ps(most, 0xb1), larger)
#define MEET_2(larger) MEET(_mm512_permute_ps(most, 0x4e), larger)
#define MEET_4(larger) MEET(_mm512_shuffle_f32x4(most, most, 0xb1), larger)
#define MEET_8(larger) MEET(_mm512_shuffle_f32x4(most, most, 0x4e), larger)

static inline float kth_bound(const float *x, const float *bias, float by, int64_t experts, int64_t k) {
    __m512 least = _mm512_set1_ps(-INFINITY), most = least, met;
    for (int64_t j = 0; j < experts; j += LANES) {
        __mmask16 mask = MASK(experts - j);
        most = _mm512_mask_max_ps(most, mask, shifted(x, bias, by, j, mask), most); /* in this order without NaN */
    }
    if (k == 1) return _mm512_reduce_max_ps(most);
    MEET_1(0x9999)
    MEET_2(0xc3c3) MEET_1(0xa5a5)
    MEET_4(0xf00f) MEET_2(0xcc33) MEET_1(0xaa55)
    MEET_8(0xff00) MEET_4(0xf0f0) MEET_2(0xcccc) MEET_1(0xaaaa) /* ascending */
    float sorted[LANES] ALIGNED;
    _mm512_store_ps(sorted, most);
    return sorted[LANES - k];
}

static inline int64_t keep(const float *x, const float *bias, float by, float bound, int64_t experts, uint32_t first,
                           uint32_t *offsets, float *kept, float *kept_bias) {
    int64_t count = 0;
    __m512i offset = _mm512_add_epi32(_mm512_set1_epi32((int32_t)first), IOTA);
    for (int64_t j = 0; j < experts; j += LANES) {
        __mmask16 mask = MASK(experts - j);
        __m512 y = shifted(x, bias, by, j, mask);
        mask = _mm512_mask_cmp_ps_mask(mask, y, _mm512_set1_ps(bound), _CMP_GE_OQ);
        _mm512_storeu_ps(kept + count, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, x + j)));
        if (bias)
            _mm512_storeu_ps(kept_bias + count, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, bias + j)));
        _mm512_storeu_si512(offsets + count, _mm512_maskz_compress_epi32(mask, offset));
        count += __builtin_popcount(mask);
        offset = _mm512_add_epi32(offset, _mm512_set1_epi32(LANES));
    }
    return count;
}
#else
static inline float kth_bound(const float *x, const float *bias, float by, int64_t experts, int64_t k) {
    float most[LANES], sorted[LANES];
    for (int64_t n = 0; n < LANES; ++n) most[n] = -INFINITY;
    int64_t j = 0;
    for (; j + LANES <= experts; j += LANES)
#pragma omp simd
        for (int64_t n = 0; n < LANES; ++n) {
            float y = SHIFTED(j + n);
            most[n] = y > most[n] ? y : most[n];
        }
    for (; j < experts; ++j) {
        float y = SHIFTED(j);
        most[j % LANES] = y > most[j % LANES] ? y : most[j % LANES];
    }
    for (int64_t n = 0; n < LANES; ++n) {
        if (n >= k && most[n] <= sorted[k - 1]) continue;
        int64_t at = n < k ? n : k - 1;
        for (; at > 0 && sorted[at - 1] < most[n]; --at) sorted[at] = sorted[at - 1];
        sorted[at] = most[n];
    }
    return sorted[k - 1];
}

static inline int64_t keep(const float *x, const float *bias, float by, float bound, int64_t experts, uint32_t first,
                           uint32_t *offsets, float *kept, float *kept_bias) {
    int64_t count = 0, j = 0;
    for (; j + LANES <= experts; j += LANES) { /* most parts of a long row have none */
        int32_t hits = 0;
#pragma omp simd reduction(| : hits)
        for (int64_t n = 0; n < LANES; ++n) hits |= (SHIFTED(j + n) >= bound) << n;
        for (; hits; hits &= hits - 1, ++count) {
            int64_t at = j + __builtin_ctz((uint32_t)hits);
            kept[count] = x[at], kept_bias[count] = bias ? bias[at] : 0, offsets[count] = first + (uint32_t)at;
        }
    }
    for (; j < experts; ++j) { /* without a branch */
        kept[count] = x[j], kept_bias[count] = bias ? bias[j] : 0, offsets[count] = first + (uint32_t)j;
        count += SHIFTED(j) >= bound;
    }
    return count;
}
#endif

#ifdef __AVX512F__
/* Lane i meets lane (i + by) % 16, which has the lower index in the last `by` lanes and wins a tie there. */
#define BEATEN(by) \
    met = _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(rest), _mm512_castps_si512(rest), by)), \
    wins = _mm512_cmp_ps_mask(met, rest, _CMP_GT_OQ) | \
           _mm512_mask_cmp_ps_mask((__mmask16)(0xffff << (LANES - by)), met, rest, _CMP_EQ_OQ), \
    rank = _mm512_mask_add_epi32(rank, wins, rank, one);
#endif

/* The places of the k largest of y, descending, of equal ones the first first; NaN counts as -inf. */
static inline void pick(const float *y, int64_t count, int64_t k, int32_t *places) {
#ifdef __AVX512F__
    if (count <= LANES) {
        __m512 least = _mm512_set1_ps(-INFINITY);
        __mmask16 left = MASK(count);
        __m512 rest = _mm512_max_ps(_mm512_mask_loadu_ps(least, left, y), least); /* in this order NaN is lost */
        if (k > 3) {
            /* All against all: a place's rank is how many beat it. */
            __m512i rank = _mm512_setzero_si512(), one = _mm512_set1_epi32(1);
            __m512 met;
            __mmask16 wins;
            BEATEN(1) BEATEN(2) BEATEN(3) BEATEN(4) BEATEN(5) BEATEN(6) BEATEN(7) BEATEN(8)
            BEATEN(9) BEATEN(10) BEATEN(11) BEATEN(12) BEATEN(13) BEATEN(14) BEATEN(15)
            _mm512_i32scatter_epi32(places, rank, IOTA, 4);
            return;
        }
        for (int64_t n = 0; n < k; ++n) {
            __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(rest));
            places[n] = __builtin_ctz(_mm512_mask_cmp_ps_mask(left, rest, top, _CMP_EQ_OQ));
            __mmask16 taken = (__mmask16)(1u << places[n]);
            left &= ~taken;
            rest = _mm512_mask_mov_ps(rest, taken, least);
        }
        return;
    }
#endif
    float best[k];
    for (int64_t i = 0, found = 0; i < count; ++i) {
        float value = y[i] > -INFINITY ? y[i] : -INFINITY;
        if (found == k && value <= best[k - 1]) continue;
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && best[at - 1] < value; --at) best[at] = best[at - 1], places[at] = places[at - 1];
        best[at] = value, places[at] = (int32_t)i;
    }
}

#endif
