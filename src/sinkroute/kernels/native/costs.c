/* The softmax cost of all rows, for problems so small that keeping it is cheaper than making it anew at every pass. */
#include "row.h"

/* out: (tokens, experts); rows with mask 0 are left as they are. */
void costs(const Rows *s, float *out) {
    int64_t experts = s->experts, padded = PAD(experts);
    float buffer[padded] ALIGNED;
    for (int64_t row = 0; row < s->tokens; ++row) {
        if (s->mask && !s->mask[row * s->mask_stride]) continue;
        memcpy(out + row * experts, read_cost(s, row, buffer), experts * sizeof(float));
    }
}
