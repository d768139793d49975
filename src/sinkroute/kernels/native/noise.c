/* Standard normal numbers, each a function of (seed, place) alone, so that whoever needs a few draws those few.
 *
 *     32 bits   Threefry-2x32 with 20 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011,
 *               section 3.3): key = seed, counter = place with bit 4 cleared, word = bit 4 of the place.
 *     normal    the top bit is the sign, the rest m the quantile of p = (m + 1/2) / 2^32 <= 1/2, by M. Giles
 *               (Approximating the erfinv function, GPU Computing Gems 2, 2011): with w = -ln(4 p (1 - p)) and
 *               x = 1 - 2 p it is x times a polynomial in w, or in sqrt(w) in the tails. Minimax coefficients of ours,
 *               as his end at 2^-24.
 *
 * Over all 2^32 patterns: symmetric, so that odd moments vanish; |n| <= 6.33796; the distribution function is off by
 * less than 1e-7, in the tails by 1.2e-5 of what is left there; moments 2, 4 and 6 are 6e-8, 3e-7 and 3e-6 too small.
 *
 * Integers, fma, sqrt and products that nothing is added to: the same bits on every machine, vector or scalar.
 */
#include "noise.h"

#include <math.h>

#define BLOCK 32 /* places whose counters differ in the low 4 bits and whose words are both used */

#define ROTATED(x, n) ((x) << (n) | (x) >> (32 - (n)))
#define MIX(n) a += b, b = ROTATED(b, n) ^ a;
#define ROUNDS(p, q, r, s, i) MIX(p) MIX(q) MIX(r) MIX(s) a += key[(i) % 3], b += key[((i) + 1) % 3] + (i);

static inline void threefry(const uint32_t key[3], uint32_t counter, uint32_t high, uint32_t *first, uint32_t *second) {
    uint32_t a = counter + key[0], b = high + key[1];
    ROUNDS(13, 15, 26, 6, 1)
    ROUNDS(17, 29, 16, 24, 2)
    ROUNDS(13, 15, 26, 6, 3)
    ROUNDS(17, 29, 16, 24, 4)
    ROUNDS(13, 15, 26, 6, 5)
    *first = a, *second = b;
}

static inline float bits_as_float(uint32_t bits) {
    union { uint32_t i; float f; } out = {bits};
    return out.f;
}

static inline uint32_t float_as_bits(float x) {
    union { float f; uint32_t i; } out = {x};
    return out.i;
}

#define TAIL 5.0f

/* 1 - 2 p, with the sign of the number, and w = -ln(4 p (1 - p)). */
static inline float spread(uint32_t bits, float *w) {
    const uint32_t root_half = 0x3f3504f3u; /* mantissas from there to twice that: f is in [-0.29, 0.41] */
    float p = fmaf((float)(int32_t)(bits & 0x7fffffffu), 0x1p-32f, 0x1p-33f);
    uint32_t above = float_as_bits(4 * p * (1 - p)) - root_half;
    float f = bits_as_float((above & 0x7fffffu) + root_half) - 1, exponent = (float)((int32_t)above >> 23);
    float c = -0.106863692f;
    c = fmaf(c, f, 0.161721274f);
    c = fmaf(c, f, -0.170687988f);
    c = fmaf(c, f, 0.199078649f);
    c = fmaf(c, f, -0.249846682f);
    c = fmaf(c, f, 0.33334583f);
    c = fmaf(c, f, -0.500000775f);
    *w = -fmaf(exponent, 0.693147182f, fmaf(c * f, f, f));
    return bits_as_float(float_as_bits(fmaf(-2, p, 1)) | (bits & 0x80000000u));
}

/* x times the polynomial for w <= TAIL. */
static inline float central(float x, float w) {
    float u = w - 2.5f, c = 3.38497195e-08f;
    c = fmaf(c, u, 4.84906138e-07f);
    c = fmaf(c, u, -4.9094474e-06f);
    c = fmaf(c, u, -6.2048889e-06f);
    c = fmaf(c, u, 0.000308834395f);
    c = fmaf(c, u, -0.0017730511f);
    c = fmaf(c, u, -0.00590777816f);
    c = fmaf(c, u, 0.348802686f);
    c = fmaf(c, u, 2.12331343f);
    return c * x;
}

static float tail(float x, float w) {
    float u = sqrtf(w) - 3.5f, c = -0.000248073442f;
    c = fmaf(c, u, 0.000791188812f);
    c = fmaf(c, u, -0.00107720874f);
    c = fmaf(c, u, 0.00142673742f);
    c = fmaf(c, u, -0.00286149954f);
    c = fmaf(c, u, 0.00466203763f);
    c = fmaf(c, u, 1.42462777f);
    c = fmaf(c, u, 4.71708807f);
    return c * x;
}

/* The tails (one number in 300) are done again one by one. */
static inline void normals_of(const uint32_t *bits, float *out) {
    float x[BLOCK], w[BLOCK];
    int32_t far = 0;
#pragma omp simd reduction(| : far)
    for (int64_t n = 0; n < BLOCK; ++n) {
        x[n] = spread(bits[n], w + n);
        out[n] = central(x[n], w[n]);
        far |= w[n] > TAIL;
    }
    if (far)
        for (int64_t n = 0; n < BLOCK; ++n)
            if (w[n] > TAIL) out[n] = tail(x[n], w[n]);
}

static inline void read_key(int64_t seed, uint32_t key[3]) {
    key[0] = (uint32_t)seed, key[1] = (uint32_t)((uint64_t)seed >> 32), key[2] = 0x1bd11bdau ^ key[0] ^ key[1];
}

void normal_at(int64_t seed, int64_t first, const uint32_t *offsets, int64_t count, float *out) {
    uint32_t key[3], low = (uint32_t)first, high = (uint32_t)((uint64_t)first >> 32);
    read_key(seed, key);
    for (int64_t block = 0; block < count; block += BLOCK) {
        uint32_t bits[BLOCK];
#pragma omp simd
        for (int64_t n = 0; n < BLOCK; ++n) {
            uint32_t place = low + offsets[block + n], one, other;
            threefry(key, place & ~16u, high + (place < low), &one, &other);
            bits[n] = place & 16 ? other : one;
        }
        normals_of(bits, out + block);
    }
}

/* out: (count,), the numbers of places 0 to count - 1. */
void normal(int64_t seed, int64_t count, float *out, int64_t threads) {
    uint32_t key[3];
    read_key(seed, key);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < count; block += BLOCK) {
        uint32_t bits[BLOCK];
#pragma omp simd
        for (int64_t n = 0; n < BLOCK / 2; ++n)
            threefry(key, (uint32_t)block + (uint32_t)n, (uint32_t)((uint64_t)block >> 32), bits + n,
                     bits + n + BLOCK / 2);
        if (count - block >= BLOCK) {
            normals_of(bits, out + block);
        } else {
            float last[BLOCK];
            normals_of(bits, last);
            for (int64_t n = block; n < count; ++n) out[n] = last[n - block];
        }
    }
}
