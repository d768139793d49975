/* What noise.c offers to the other kernels. */
#ifndef SINKROUTE_NOISE_H
#define SINKROUTE_NOISE_H

#include <stdint.h>

#define NOISE_BOUND 6.34f /* no number is larger: the normal quantile of 2^-33 is -6.33796 */

/* out: (count + 15 & ~15,), the numbers `seed` has at the places first + offset. */
void normal_at(int64_t seed, int64_t first, const uint32_t *offsets, int64_t count, float *out);

#endif
