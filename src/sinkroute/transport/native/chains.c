/* Repair of an assignment of k experts to every token: loads into their bounds by the cheapest chains of moves.
 *
 * A chain j -> l -> m moves one token from expert j to l and another one from l to m. Of all ways to change the loads
 * by one unit the cheapest is a shortest path between experts (successive shortest paths; the bias serves as the prices
 * that keep all lengths non-negative), so what comes out is the best assignment there is for its loads.
 *
 * The length of j -> l is the least loss C_ij - C_il over the tokens of j that may move to l. Looking through all tokens
 * of j after every move would take nearly all of the time, so only the NEAREST are kept, in order, and only from tokens
 * for which the choice of j was a close one; `bound` is what all others lose at least. A chain that rests on a bound
 * makes us look again.
 */
#include "row.h"

#define NEAREST 16
#define LOOKED_AT 256 /* tokens, in the first look; AGAIN times as many in the next */
#define AGAIN 16

typedef struct {
    const Scores *s;
    int64_t k, padded;
    int64_t *chosen;      /* (tokens, k) */
    int32_t *head;        /* (experts,) first slot of `chosen` that holds this expert, -1 for none */
    int32_t *next, *prev; /* (tokens * k,) the slots with the same expert */
    float *loss;          /* (experts, NEAREST, padded) ascending, INFINITY where there are fewer */
    int32_t *token;       /* (experts, NEAREST, padded) whose loss it is; may have moved meanwhile, the first has not */
    float *bound;         /* (experts, padded) tokens that are not kept lose at least this */
    const double *start;  /* (experts,) the bias at the start */
    float *margin;        /* (tokens * k,) lead over the best expert not chosen at the start; -INFINITY after a move */
    float *cutoff;        /* (experts,) tokens with this margin or more were not looked at */
    int64_t *looked_at;   /* (experts,) how many to look at; 0 = not yet */
    float *row;           /* (padded,) the cost of one token */
} State;

static void link_slot(State *a, int64_t slot, int64_t expert) {
    a->chosen[slot] = expert;
    a->prev[slot] = -1;
    a->next[slot] = a->head[expert];
    if (a->head[expert] >= 0) a->prev[a->head[expert]] = (int32_t)slot;
    a->head[expert] = (int32_t)slot;
}

static void unlink_slot(State *a, int64_t slot) {
    if (a->prev[slot] >= 0) a->next[a->prev[slot]] = a->next[slot];
    else a->head[a->chosen[slot]] = a->next[slot];
    if (a->next[slot] >= 0) a->prev[a->next[slot]] = a->prev[slot];
}

static int64_t slot_of(const State *a, int64_t token, int64_t expert) {
    for (int64_t n = 0; n < a->k; ++n)
        if (a->chosen[token * a->k + n] == expert) return token * a->k + n;
    return -1;
}

static int may_move(const State *a, int64_t token, int64_t j, int64_t l) {
    return slot_of(a, token, j) >= 0 && slot_of(a, token, l) < 0;
}

static void insert(State *a, int64_t j, int64_t l, int64_t token, float d) {
    int64_t padded = a->padded, first = j * NEAREST * padded + l;
    for (int64_t n = 0; n < NEAREST; ++n) /* one that moved away and came back */
        if (a->token[first + n * padded] == token && a->loss[first + n * padded] == d) return;
    float last = a->loss[first + (NEAREST - 1) * padded];
    if (last < INFINITY) {
        a->bound[j * padded + l] = last > d ? last : d;
        if (!(d < last)) return;
    }
    int64_t n = NEAREST - 1;
    for (; n > 0 && a->loss[first + (n - 1) * padded] > d; --n) {
        a->loss[first + n * padded] = a->loss[first + (n - 1) * padded];
        a->token[first + n * padded] = a->token[first + (n - 1) * padded];
    }
    a->loss[first + n * padded] = d;
    a->token[first + n * padded] = (int32_t)token;
}

/* Let a token of expert j, whose cost is in a->row, take part in the moves from j. */
static void offer(State *a, int64_t j, int64_t token) {
    int64_t padded = a->padded;
    float *bound = a->bound + j * padded, *c = a->row, own = c[j];
    for (int64_t l = 0; l < padded; l += LANES) {
        int32_t hits = 0;
#pragma omp simd reduction(| : hits)
        for (int64_t lane = 0; lane < LANES; ++lane) hits |= (own - c[l + lane] < bound[l + lane]) << lane;
        for (; hits; hits &= hits - 1) {
            int64_t at = l + __builtin_ctz(hits);
            if (slot_of(a, token, at) < 0) insert(a, j, at, token, own - c[at]);
        }
    }
}

static void load_row(State *a, int64_t token) {
    const float *c = read_cost(a->s, token, a->row);
    if (c != a->row) memcpy(a->row, c, a->padded * sizeof(float));
}

/* A margin that about `looked_at` tokens of j are below. The bits of a float >= 0 are in its order. */
static float cutoff_for(const State *a, int64_t j) {
    int32_t histogram[1 << 11] = {0};
    int64_t below = 0;
    for (int32_t slot = a->head[j]; slot >= 0; slot = a->next[slot]) {
        union { float f; int32_t i; } margin = {a->margin[slot]};
        if (margin.i >= 0) ++histogram[margin.i >> 20];
    }
    for (int32_t bucket = 0; bucket < (0x7f800000 >> 20); ++bucket) {
        below += histogram[bucket];
        if (below < a->looked_at[j]) continue;
        union { int32_t i; float f; } edge = {(bucket + 1) << 20};
        return edge.f;
    }
    return INFINITY;
}

/* What the cutoff says about a token that moves from j to l. */
static float bound_of_cutoff(const State *a, int64_t j, int64_t l) {
    return a->start[l] == -INFINITY ? INFINITY : (float)(a->cutoff[j] - a->start[j] + a->start[l]);
}

static void look(State *a, int64_t j) {
    int64_t size = NEAREST * a->padded;
    a->cutoff[j] = cutoff_for(a, j);
    for (int64_t n = 0; n < size; ++n) a->loss[j * size + n] = INFINITY, a->token[j * size + n] = -1;
    for (int64_t l = 0; l < a->padded; ++l)
        a->bound[j * a->padded + l] = l < a->s->experts ? bound_of_cutoff(a, j, l) : -INFINITY;
    for (int32_t slot = a->head[j]; slot >= 0; slot = a->next[slot]) {
        if (a->margin[slot] >= a->cutoff[j]) continue;
        load_row(a, slot / a->k);
        offer(a, j, slot / a->k);
    }
}

/* Drop what stands first in j -> l for as long as it cannot move. */
static void settle(State *a, int64_t j, int64_t l) {
    int64_t padded = a->padded, first = j * NEAREST * padded + l, last = first + (NEAREST - 1) * padded;
    while (a->loss[first] < INFINITY && !may_move(a, a->token[first], j, l)) {
        for (int64_t n = first; n < last; n += padded) {
            a->loss[n] = a->loss[n + padded];
            a->token[n] = a->token[n + padded];
        }
        a->loss[last] = INFINITY, a->token[last] = -1;
    }
}

static void move_slot(State *a, int64_t slot, int64_t j, int64_t l) {
    int64_t token = slot / a->k, padded = a->padded;
    unlink_slot(a, slot);
    link_slot(a, slot, l);
    for (int64_t to = 0; to < padded; ++to)
        if (a->token[j * NEAREST * padded + to] == token) settle(a, j, to);
    load_row(a, token);
    for (int64_t n = 0; n < a->k; ++n) {
        int64_t m = a->chosen[token * a->k + n];
        a->margin[token * a->k + n] = -INFINITY;
        if (!a->looked_at[m]) continue;
        if (m == l) {
            offer(a, l, token);
        } else {
            if (a->token[m * NEAREST * padded + l] == token) settle(a, m, l);
            float d = a->row[m] - a->row[j];
            if (d < a->bound[m * padded + j]) insert(a, m, j, token, d);
        }
    }
}

/* How many tokens of j lose no more than the first when they move to l, at most `wanted`. */
static int64_t count_ties(State *a, int64_t j, int64_t l, int64_t wanted) {
    int64_t padded = a->padded, first = j * NEAREST * padded + l, ties = 0;
    float least = a->loss[first];
    if (wanted > 1 && a->bound[j * padded + l] == least) {
        for (int32_t slot = a->head[j]; slot >= 0 && ties < wanted; slot = a->next[slot]) {
            if (slot_of(a, slot / a->k, l) >= 0) continue;
            load_row(a, slot / a->k);
            ties += a->row[j] - a->row[l] == least;
        }
        return ties;
    }
    for (int64_t n = 0; n < NEAREST && ties < wanted && a->loss[first + n * padded] == least; ++n)
        ties += may_move(a, a->token[first + n * padded], j, l);
    return ties;
}

static void move(State *a, int64_t j, int64_t l, int64_t units) {
    int64_t first = j * NEAREST * a->padded + l;
    float least = a->loss[first];
    for (; units && a->loss[first] == least; --units) move_slot(a, slot_of(a, a->token[first], j), j, l);
    for (int32_t slot = a->head[j], after; units; slot = after) {
        after = a->next[slot];
        if (slot_of(a, slot / a->k, l) >= 0) continue;
        load_row(a, slot / a->k);
        if (a->row[j] - a->row[l] == least) move_slot(a, slot, j, l), --units;
    }
}

/* The cheapest chain from an expert with more than `floor` to one with less: its end, NONE, or LOOK_AGAIN after more
 * tokens were looked at. from: (experts,) out, the expert before on the way, -1 at the start. */
enum { NONE = -1, LOOK_AGAIN = -2 };
static int64_t cheapest_chain(State *a, const int64_t *counts, const int64_t *floor, double *bias, int64_t *from) {
    int64_t experts = a->s->experts, padded = a->padded, end = -1;
    double distance[padded];
    uint8_t done[padded];
    for (int64_t j = 0; j < experts; ++j) {
        distance[j] = counts[j] > floor[j] ? 0 : INFINITY;
        from[j] = -1;
        done[j] = 0;
    }
    for (;;) {
        int64_t j = -1;
        double least = INFINITY;
        for (int64_t l = 0; l < experts; ++l)
            if (!done[l] && distance[l] < least) least = distance[l], j = l;
        if (j < 0) return NONE;
        if (counts[j] < floor[j]) {
            end = j;
            break;
        }
        done[j] = 1;
        if (!a->looked_at[j]) a->looked_at[j] = LOOKED_AT, look(a, j);
        const float *loss = a->loss + j * NEAREST * padded, *bound = a->bound + j * padded;
        for (int64_t l = 0; l < experts; ++l) {
            double length = (loss[l] < bound[l] ? loss[l] : bound[l]) + (bias[j] - bias[l]);
            length = least + (length > 0 ? length : 0); /* below 0 by rounding only */
            if (!done[l] && length < distance[l]) distance[l] = length, from[l] = j;
        }
    }
    int again = 0;
    for (int64_t l = end, j; (j = from[l]) >= 0; l = j) {
        if (a->loss[j * NEAREST * padded + l] <= a->bound[j * padded + l]) continue;
        if (a->bound[j * padded + l] >= bound_of_cutoff(a, j, l)) a->looked_at[j] *= AGAIN;
        look(a, j);
        again = 1;
    }
    if (again) return LOOK_AGAIN;
    for (int64_t j = 0; j < experts; ++j) bias[j] += distance[j] < distance[end] ? distance[j] : distance[end];
    return end;
}

/* Move loads above `upper` down, then those below `lower` up as far as there are ways.
 * chosen: (tokens, k), the k largest of C + bias. margin: (tokens, k), their lead over the next. counts: (experts,),
 * those of chosen. bias: (experts,). All four are changed; C + bias has the new choice as its k largest, with ties.
 * Returns the tokens moved, -1 without memory. */
int64_t repair(const Scores *s, int64_t k, const int64_t *lower, const int64_t *upper, int64_t *chosen, float *margin,
               int64_t *counts, double *bias) {
    int64_t experts = s->experts, padded = PAD(experts), slots = s->tokens * k, moves = 0;
    size_t row = padded * sizeof(float);
    int64_t from[padded];
    double start[experts];
    memcpy(start, bias, sizeof start);
    State a = {.s = s, .k = k, .padded = padded, .chosen = chosen, .margin = margin, .start = start};
    a.head = malloc(experts * sizeof(int32_t));
    a.next = malloc(slots * sizeof(int32_t));
    a.prev = malloc(slots * sizeof(int32_t));
    a.loss = aligned_alloc(64, experts * NEAREST * row);
    a.token = aligned_alloc(64, experts * NEAREST * row);
    a.bound = aligned_alloc(64, experts * row);
    a.row = aligned_alloc(64, row);
    a.cutoff = malloc(experts * sizeof(float));
    a.looked_at = calloc(experts, sizeof(int64_t));
    if (!a.head || !a.next || !a.prev || !a.loss || !a.token || !a.bound || !a.row || !a.cutoff || !a.looked_at)
        moves = -1;
    if (moves == 0) {
        memset(a.token, 0xff, experts * NEAREST * row);
        for (int64_t j = 0; j < experts; ++j) a.head[j] = -1;
        for (int64_t token = s->tokens - 1; token >= 0; --token) {
            if (s->mask && !s->mask[token * s->mask_stride]) continue;
            for (int64_t n = 0; n < k; ++n) link_slot(&a, token * k + n, chosen[token * k + n]);
        }
        for (int phase = 0; phase < 2; ++phase) {
            const int64_t *floor = phase ? lower : upper;
            for (;;) {
                int64_t open = 0;
                for (int64_t j = 0; j < experts; ++j) open |= phase ? counts[j] < lower[j] : counts[j] > upper[j];
                int64_t end = open ? cheapest_chain(&a, counts, floor, bias, from) : NONE;
                if (end == LOOK_AGAIN) continue;
                if (end == NONE) break;
                int64_t units = floor[end] - counts[end], start = end;
                for (; from[start] >= 0; start = from[start]) units = count_ties(&a, from[start], start, units);
                if (counts[start] - floor[start] < units) units = counts[start] - floor[start];
                counts[start] -= units, counts[end] += units;
                for (int64_t l = end; from[l] >= 0; l = from[l]) move(&a, from[l], l, units), moves += units;
            }
        }
    }
    free(a.head), free(a.next), free(a.prev), free(a.loss), free(a.token), free(a.bound), free(a.row);
    free(a.cutoff), free(a.looked_at);
    return moves;
}
