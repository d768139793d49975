/* One row of logits, as every kernel here reads it: any dtype in, float32 out, padded to whole vectors.
 *
 * Loops run over PAD(experts) elements with `omp simd`, which lets the compiler vectorise reductions without
 * -ffast-math (linking with that would change the rounding of the whole process). Nothing here needs libm.
 */
#ifndef SINKROUTE_ROW_H
#define SINKROUTE_ROW_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define PAD(n) (((n) + LANES - 1) & ~(int64_t)(LANES - 1)) /* a mask, so that the compiler sees whole vectors */
#define ALIGNED __attribute__((aligned(64)))
#define LOG2E 1.4426950408889634

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* What is read: (tokens, experts), rows `row_stride` elements apart, columns 1. `mask` and `mass` may be NULL. */
typedef struct {
    const void *logits;
    int64_t dtype, tokens, experts, row_stride, softmax_cost;
    const uint8_t *mask; /* 0 = the row is not looked at */
    int64_t mask_stride;
    const float *mass;
    int64_t mass_stride;
} Rows;

/* 2^x for -63 <= x <= 127, and the nearer end's value outside; relative error below 1.2e-7. NaN stays NaN.
 * The floor, 1e-19, is nothing beside 1, and its square is no denormal, which would be slow. */
static inline float exp2_of(float x) {
    x = x < -63.0f ? -63.0f : x;
    x = x > 127.0f ? 127.0f : x;
    float rounded = rintf(x), f = x - rounded;
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    union { float f; uint32_t i; } out = {p};
    out.i += (uint32_t)(int32_t)rounded << 23; /* into the exponent; without a sign, as NaN would overflow */
    return out.f;
}

static inline float bfloat16_of(uint16_t bits) {
    union { uint32_t i; float f; } out = {(uint32_t)bits << 16};
    return out.f;
}

static inline float float16_of(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    union { uint32_t i; float f; } out;
    out.i = rest << 13;
    out.f *= 0x1p112f; /* moves the exponent, subnormals included */
    out.i |= rest >= 0x7c00u ? 0x7f800000u : 0;
    out.i |= sign;
    return out.f;
}

/* The logits of one token as float32, padded with -inf: `buffer`, or the memory itself where that needs no change. */
static inline const float *read_row(const Rows *s, int64_t row, float *buffer) {
    int64_t experts = s->experts, at = row * s->row_stride;
    if (s->dtype == FLOAT32) {
        const float *in = (const float *)s->logits + at;
        if (experts % LANES == 0) return in;
        memcpy(buffer, in, experts * sizeof(float));
    } else {
        const uint16_t *in = (const uint16_t *)s->logits + at;
        if (s->dtype == BFLOAT16) {
            for (int64_t j = 0; j < experts; ++j) buffer[j] = bfloat16_of(in[j]);
        } else {
            for (int64_t j = 0; j < experts; ++j) buffer[j] = float16_of(in[j]);
        }
    }
    for (int64_t j = experts; j < PAD(experts); ++j) buffer[j] = -INFINITY;
    return buffer;
}

#ifdef __AVX512F__
#include "avx512.h"
#else
static inline float row_max(const float *x, int64_t padded) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < padded; ++j) largest = x[j] > largest ? x[j] : largest;
    return largest;
}

/* max_j(x_j + g_j) in float32. Any number near it will do where it only keeps exponentials in range. */
static inline float shifted_max(const float *x, const float *g, int64_t padded) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < padded; ++j) {
        float y = x[j] + g[j];
        largest = y > largest ? y : largest;
    }
    return largest;
}

/* The largest of the y that come after (before, before_at), where larger ones come first and of equal ones that with the
 * lower index; its index into `at`. Start from (INFINITY, -1). */
static inline float next_largest(const float *y, int64_t padded, float before, int64_t before_at, int64_t *at) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < padded; ++j) {
        float x = (y[j] < before) | ((y[j] == before) & (j > before_at)) ? y[j] : -INFINITY;
        largest = x > largest ? x : largest;
    }
    int64_t j = largest < before ? 0 : before_at + 1;
    while (j < padded - 1 && y[j] != largest) ++j;
    *at = j;
    return largest;
}

/* out_j = exp(x_j - top), -inf where x_j is, and their sum. */
static inline float softmax_numerators(const float *x, float top, int64_t padded, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < padded; ++j) {
        float e = exp2_of((float)LOG2E * (x[j] - top));
        sum += e;
        out[j] = x[j] == -INFINITY ? -INFINITY : e;
    }
    return sum;
}

/* e_j = 2^(c_j inv + shift_j - top), and their sum: the shift in float64 or, `narrow_`, in float32. */
static inline float exponentials(const float *c, const double *shift, double inv, double top, int64_t padded,
                                 float *e) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < padded; ++j) {
        e[j] = exp2_of((float)(c[j] * inv + (shift[j] - top)));
        sum += e[j];
    }
    return sum;
}

static inline float narrow_exponentials(const float *c, const float *shift, float inv, float top, int64_t padded,
                                        float *e) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < padded; ++j) {
        e[j] = exp2_of(c[j] * inv + (shift[j] - top));
        sum += e[j];
    }
    return sum;
}

/* block_j += mass p_j and squares_j += mass p_j^2, with p = e scale. */
static inline void accumulate(const float *e, float scale, float mass, int64_t padded, float *block, float *squares) {
#pragma omp simd
    for (int64_t j = 0; j < padded; ++j) {
        float p = e[j] * scale, share = p * mass;
        block[j] += share;
        squares[j] += share * p;
    }
}
#endif

/* The transport cost of one row: the logits, or their softmax, where -inf stays -inf (a forbidden expert). */
static inline const float *read_cost(const Rows *s, int64_t row, float *buffer) {
    const float *x = read_row(s, row, buffer);
    if (!s->softmax_cost) return x;
    int64_t padded = PAD(s->experts);
    float scale = 1 / softmax_numerators(x, row_max(x, padded), padded, buffer);
#pragma omp simd
    for (int64_t j = 0; j < padded; ++j) buffer[j] *= scale;
    return buffer;
}

#endif
