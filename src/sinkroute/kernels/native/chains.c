/* Repair of an assignment of k experts to every token: loads into their bounds by the cheapest chains of moves.
 *
 * A chain j -> l -> m moves one token from expert j to l and another one from l to m. With the bias g and a number
 * u_i for every token, between what its last expert is worth and the best that it has not,
 *
 *     min over its experts j of (C_ij + g_j)  >=  u_i  >=  max over all others l of (C_il + g_l),
 *
 * taking expert j from token i costs C_ij + g_j - u_i, and giving it l costs u_i - C_il - g_l: none is below 0. A
 * round of shortest paths over experts and tokens (Dijkstra; of equally short ones those of fewest moves) gives every
 * node its distance from the experts that have too much. Adding it to g and u, up to where enough experts with room
 * are reached, keeps both inequalities and makes the shortest paths cost nothing: as many as do not get into each
 * other's way are taken together (a blocking flow). Every assignment on the way is the best there is for its loads,
 * and where no path is left no assignment keeps the bounds.
 *
 * Beside the logits there are a few numbers per token, choice and expert. What a token could be given is read from
 * its row. Of many tokens few are near another expert: only choices that cost at most `room` to take are linked to
 * their expert; what is not costs more than `room` less all distances that have been added since. When they have used
 * it up, all is linked anew with more room.
 */
#include "chains.h"

#include <float.h>

#define ROUNDING 1e-12 /* of |C + g|: what is a tie */
#ifndef WORK
#define WORK (1 << 28) /* logits to look at before the caller is asked whether to go on */
#endif
#define KEPT (12 << 20) /* costs of a softmax that are kept: 48 MiB */

/* The cost of a token's experts. */
static const float *row_of(State *a, int64_t i) {
    if (!a->most_rows) return read_cost(a->s, i, a->row);
    if (a->place[i] < 0) {
        if (a->kept_rows == a->most_rows) return read_cost(a->s, i, a->row);
        a->place[i] = (int32_t)a->kept_rows++;
        float *kept = a->kept + a->place[i] * a->padded;
        read_cost(a->s, i, kept);
    }
    return a->kept + a->place[i] * a->padded;
}

/* Make the k largest of C + g, in float64, every token's choice; find every u, and what the choice costs. */
static void settle(State *a) {
    const Rows *s = a->s;
    int64_t padded = a->padded, k = a->k, *counts = a->counts;
    const double *g = a->g;
    double y[padded] ALIGNED, own[k];
    for (int64_t row = 0; row < s->tokens; ++row) {
        if (s->mask && !s->mask[row * s->mask_stride]) continue;
        const float *c = row_of(a, row);
        int64_t *mine = a->chosen + row * k;
#pragma omp simd
        for (int64_t l = 0; l < padded; ++l) y[l] = c[l] + g[l];
        for (;;) {
            int64_t at = 0;
            for (int64_t n = 0; n < k; ++n) {
                own[n] = y[mine[n]];
                if (own[n] < own[at]) at = n;
            }
            double last = own[at], best = -INFINITY;
            for (int64_t n = 0; n < k; ++n) y[mine[n]] = -INFINITY;
#pragma omp simd reduction(max : best)
            for (int64_t l = 0; l < padded; ++l) best = y[l] > best ? y[l] : best;
            a->u[row] = best < last ? best : last;
            if (!(best - last > 2 * ROUNDING * fabs(best))) break; /* also where last is -inf, as float32 may make it */
            int64_t l = 0;
            while (y[l] != best) ++l;
            for (int64_t n = 0; n < k; ++n) y[mine[n]] = own[n];
            --counts[mine[at]], ++counts[l];
            mine[at] = l;
        }
        for (int64_t n = 0; n < k; ++n) a->cost[row * k + n] = c[mine[n]];
    }
}

static inline double at_least_0(double x) { return x > 0 ? x : 0; }

static inline double cost_to_take(const State *a, int64_t slot) {
    return at_least_0(a->cost[slot] + a->g[a->chosen[slot]] - a->u[slot / a->k]);
}

/* Links what costs at most `room` to take. */
static void link_all(State *a, double room) {
    a->room = room;
    for (int64_t j = 0; j < a->experts; ++j) a->head[j] = -1;
    for (int64_t i = a->s->tokens - 1; i >= 0; --i) {
        if (a->s->mask && !a->s->mask[i * a->s->mask_stride]) continue;
        for (int64_t slot = i * a->k; slot < (i + 1) * a->k; ++slot)
            if (cost_to_take(a, slot) <= room) hold(a, slot, a->chosen[slot]);
    }
}

static inline double cost_to_give(const State *a, int64_t token, int64_t expert, float cost) {
    return at_least_0(a->u[token] - (cost + a->g[expert]));
}

/* C + `sum` is compared in float32, for speed: what it finds is looked at in float64, and it leaves nothing out. */
static inline float upwards(double x) {
    if (x < -FLT_MAX) return -FLT_MAX;
    float y = (float)x;
    return y + 1.2e-7f * fabsf(y) + 1e-37f;
}

static inline float downwards(double x) { return -upwards(-x); }

static inline int takes(const State *a, int64_t j) { return a->spare[j] < 0 && a->distance[j] + a->g[j] < a->worth; }

/* Which of LANES experts token i might be given at a distance that is no longer than theirs, as bits. */
static inline int32_t within_reach(const State *a, const float *c, int64_t first, float least) {
    int32_t hits = 0;
#pragma omp simd reduction(| : hits)
    for (int64_t lane = 0; lane < LANES; ++lane) hits |= (c[first + lane] + a->sum[first + lane] >= least) << lane;
    return hits;
}

/* Distances from the experts that give, up to that of experts that can take `wanted` choices in all, or up to what room
 * there is. Returns it; -1 where no such expert can be reached; NAN without memory. */
static double distances(State *a, int64_t wanted) {
    int64_t experts = a->experts, padded = a->padded, open = 0;
    double end = a->room, last = -1;
    a->heaped = 0;
    for (int64_t j = 0; j < padded; ++j) a->sum[j] = INFINITY;
    for (int64_t j = 0; j < experts; ++j) {
        a->distance[j] = INFINITY, a->hops[j] = 0, a->state[j] = 0, a->at[j] = a->head[j];
        if (a->spare[j] <= 0) continue;
        a->distance[j] = a->start[j], a->sum[j] = upwards(a->g[j] + a->start[j]), a->hops[j] = 0;
        if (push(a, a->start[j], 0, j)) return NAN;
    }
    a->reached_count = a->tied = 0;
    while (a->heaped) {
        Item item = pop(a);
        if (item.distance > end) break;
        int32_t hops = item.hops + 1;
        if (item.node < experts) {
            int64_t j = item.node;
            if (a->state[j] || item.distance != a->distance[j] || item.hops != a->hops[j]) continue;
            a->state[j] = 1;
            if (takes(a, j)) {
                last = item.distance, open -= a->spare[j];
                if (open >= wanted) end = item.distance;
            }
            for (int32_t slot = a->head[j]; slot >= 0; slot = a->next[slot]) {
                int64_t i = slot / a->k;
                double distance = item.distance + cost_to_take(a, slot);
                if (a->seen[i] || distance > end || distance > a->reach[i] || distance == INFINITY) continue;
                if (distance == a->reach[i] && hops >= a->token_hops[i]) continue;
                if (a->reach[i] == INFINITY) a->reached[a->reached_count++] = (int32_t)i, a->to[i] = 0;
                a->reach[i] = distance, a->token_hops[i] = hops;
                if (push(a, distance, hops, experts + i)) return NAN;
            }
        } else {
            int64_t i = item.node - experts;
            if (a->seen[i] || item.distance != a->reach[i] || item.hops != a->token_hops[i]) continue;
            a->seen[i] = 1, a->work += padded;
            const float *c = row_of(a, i);
            float least = downwards(item.distance + a->u[i]);
            for (int64_t first = 0; first < padded; first += LANES) {
                for (int32_t hits = within_reach(a, c, first, least); hits; hits &= hits - 1) {
                    int64_t l = first + __builtin_ctz(hits);
                    double distance = item.distance + cost_to_give(a, i, l, c[l]);
                    if (distance > end || distance > a->distance[l] || l >= experts) continue;
                    if (distance == a->distance[l] && hops > a->hops[l]) continue;
                    if (distance == INFINITY || has(a, i, l)) continue;
                    if (distance == a->distance[l] && hops == a->hops[l]) {
                        a->tied = 1;
                        continue;
                    }
                    a->distance[l] = distance, a->sum[l] = upwards(a->g[l] + distance), a->hops[l] = hops;
                    a->parent[l] = (int32_t)i, a->parent_cost[l] = c[l];
                    if (push(a, distance, hops, l)) return NAN;
                }
            }
        }
    }
    return last;
}

/* The next expert on a shortest path that token i could be given and from which there may be a way on; -1 for none. */
static int64_t way_on(State *a, int64_t i, double end, float *cost) {
    if (!a->tied) {
        for (; a->to[i] < a->experts; a->to[i] = a->sibling[a->to[i]]) {
            int64_t l = a->to[i];
            if (a->state[l] || has(a, i, l)) continue;
            *cost = a->parent_cost[l];
            return l;
        }
        return -1;
    }
    if (a->to[i] >= a->experts) return -1;
    const float *c = row_of(a, i);
    a->work += a->padded - a->to[i];
    float least = downwards(a->reach[i] + a->u[i]);
    for (int64_t first = a->to[i] & -LANES; first < a->padded; first += LANES) {
        for (int32_t hits = within_reach(a, c, first, least); hits; hits &= hits - 1) {
            int64_t l = first + __builtin_ctz(hits);
            if (l < a->to[i] || l >= a->experts || a->state[l]) continue;
            if (!(a->distance[l] <= end) || a->hops[l] != a->token_hops[i] + 1) continue;
            if (a->reach[i] + cost_to_give(a, i, l, c[l]) != a->distance[l] || has(a, i, l)) continue;
            *cost = c[l];
            return a->to[i] = (int32_t)l;
        }
    }
    a->to[i] = (int32_t)a->experts;
    return -1;
}

/* Take a shortest path from expert `source` to one that can take a choice; 0 where there is none left. */
static int take_chain(State *a, int64_t source, double end) {
    int64_t depth = 0, j = source;
    for (;;) {
        int64_t given = -1;
        int32_t slot = a->at[j];
        for (; slot >= 0; slot = a->next[slot]) {
            int64_t i = slot / a->k;
            if (!a->seen[i] || a->token_hops[i] != a->hops[j] + 1) continue;
            if (a->reach[i] != a->distance[j] + cost_to_take(a, slot)) continue;
            if ((given = way_on(a, i, end, a->costs + depth)) >= 0) break;
        }
        a->at[j] = slot;
        if (given >= 0) {
            a->taken[depth] = slot, a->given[depth] = (int32_t)given, ++depth;
            j = given;
            if (!takes(a, j)) continue;
            --a->counts[source], ++a->counts[j], --a->spare[source], ++a->spare[j];
            for (int64_t n = 0; n < depth; ++n) {
                slot = a->taken[n];
                a->at[a->chosen[slot]] = a->next[slot];
                let_go(a, slot);
                a->chosen[slot] = a->given[n], a->cost[slot] = a->costs[n];
                hold(a, slot, a->chosen[slot]);
            }
            a->moves += depth;
            return 1;
        }
        a->state[j] = 1; /* no way on from here */
        if (!depth) return 0;
        --depth;
        j = a->chosen[a->taken[depth]];
        int64_t i = a->taken[depth] / a->k;
        a->to[i] = a->tied ? a->to[i] + 1 : a->sibling[a->to[i]];
    }
}

/* One round: the chains that are shortest now, at most up to where `wanted` choices are taken. DONE, NONE where there
 * is no way at all, or -1 without memory. */
enum { NONE = 0, DONE = 1 };
static int round_of_chains(State *a, int64_t wanted) {
    double end = distances(a, wanted);
    if (isnan(end)) return -1;
    memset(a->state, 0, a->experts);
    if (end >= 0 && !a->tied) {
        for (int64_t n = 0; n < a->reached_count; ++n) a->to[a->reached[n]] = (int32_t)a->experts;
        for (int64_t l = a->experts - 1; l >= 0; --l) {
            if (!a->hops[l] || !(a->distance[l] <= end)) continue;
            a->sibling[l] = a->to[a->parent[l]], a->to[a->parent[l]] = (int32_t)l;
        }
    }
    if (end >= 0)
        for (int64_t j = 0; j < a->experts; ++j) /* not from one that another reaches sooner */
            while (a->spare[j] > 0 && a->distance[j] == a->start[j] && !a->state[j] && take_chain(a, j, end)) continue;
    double by = end >= 0 ? end : a->room;
    int known = by < INFINITY;
    /* Not d more for those that are reached and `by` for all others, but by - d less: it is the same. */
    for (int64_t j = 0; j < a->experts; ++j)
        if (known && a->distance[j] < by) a->g[j] -= by - a->distance[j];
    for (int64_t n = 0; n < a->reached_count; ++n) {
        int64_t i = a->reached[n];
        if (known && a->reach[i] < by) a->u[i] -= by - a->reach[i];
        a->reach[i] = INFINITY, a->seen[i] = 0;
    }
    if (!known) return NONE;
    a->room -= by;
    return DONE;
}

/* What one call of `repair` leaves to the next. A part that has ended is not begun again, nor room that was too little
 * tried again: every call gets further, even where one round is all that it has time for. */
enum { START, ABOVE, BELOW };
typedef struct {
    double room; /* how far most experts' next tokens are, about */
    int64_t widened, part, moves;
} Progress;

/* Chains until loads above `upper` are down, then until those below `lower` are up, as far as there are ways; or until
 * so much has been looked at. 1: done, 0: to be gone on with, -1: no memory. */
static int balance(State *a, const int64_t *lower, const int64_t *upper, Progress *to) {
    link_all(a, to->room);
    a->worth = INFINITY;
    for (; to->part <= BELOW; ++to->part) {
        int below = to->part == BELOW;
        for (;;) {
            int64_t more = 0, less = 0;
            for (int64_t j = 0; j < a->experts; ++j) {
                a->spare[j] = a->counts[j] - (below ? lower : upper)[j], a->start[j] = 0;
                more += a->spare[j] > 0 ? a->spare[j] : 0, less -= a->spare[j] < 0 ? a->spare[j] : 0;
            }
            int64_t open = below ? less : more;
            if (!open) break;
            if (a->work > WORK) return 0;
            int state = round_of_chains(a, (open + 1) / 2);
            if (state < 0) return -1;
            if (state == NONE) break;
            if (a->room <= 0) {
                to->room = ++to->widened < 12 ? 4 * to->room : INFINITY;
                link_all(a, to->room);
            }
        }
    }
    return 1;
}

/* Loads may be either of two numbers: chains that raise the sum, from experts with the larger to ones with the smaller.
 * A chain from j to l costs what its moves cost with prices, and g_j - g_l less: with the distances of those that give
 * beginning at the largest g minus theirs, it is what distance and g of its end are short of that. */
static int choose_rounding(State *a, const int64_t *lower, const int64_t *upper) {
    link_all(a, INFINITY);
    for (;;) {
        if (a->work > WORK) return 0;
        double most = -INFINITY;
        for (int64_t j = 0; j < a->experts; ++j) {
            a->spare[j] = upper[j] == lower[j] ? 0 : a->counts[j] == upper[j] ? 1 : a->counts[j] == lower[j] ? -1 : 0;
            if (a->spare[j] > 0 && a->g[j] > most) most = a->g[j];
        }
        if (most == -INFINITY) return 1;
        for (int64_t j = 0; j < a->experts; ++j) a->start[j] = most - a->g[j];
        a->worth = most - ROUNDING * (1 + fabs(most));
        a->room = INFINITY;
        int64_t before = a->moves;
        int state = round_of_chains(a, INT64_MAX);
        if (state < 0) return -1;
        if (state == NONE || a->moves == before) return 1;
    }
}

static void *part(State *a, int64_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 64) & -64);
    if (!memory) a->failed = 1;
    return a->parts[a->part_count++] = memory;
}

/* Moves tokens until loads are inside their bounds, or no way leads there, or for some tenths of a second.
 *
 * lower, upper: (experts,) bounds of the loads. chosen: (tokens, k), the k largest of C + bias but for rounding.
 * counts: (experts,), those of chosen. bias: (experts,). levels, costs: (tokens,) and (tokens, k), for the next call.
 * Those after the bounds are changed; C + bias has the new choice as its k largest, with ties. round: whether loads
 * are to be those for which the sum is largest, where bounds are no more than 1 apart. to: room from the caller, the
 * rest 0; its moves are how often a token changed its expert, in all calls. Returns 1 if that was all, 0 if it is to
 * be called again, -1 without memory. */
int64_t repair(const Rows *s, int64_t k, const int64_t *lower, const int64_t *upper, int64_t *chosen, int64_t *counts,
               double *bias, double *levels, float *costs, int64_t round, Progress *to) {
    int64_t experts = s->experts, padded = PAD(experts), tokens = s->tokens, slots = tokens * k;
    State state = {.s = s, .experts = experts, .padded = padded, .k = k, .chosen = chosen, .counts = counts};
    State *a = &state;
    a->u = levels, a->cost = costs, a->heap_size = 1 << 12;
    a->most_rows = s->softmax_cost ? KEPT / padded : 0;
    if (a->most_rows > tokens) a->most_rows = tokens;
    a->g = part(a, padded * sizeof *a->g);
    a->spare = part(a, experts * sizeof *a->spare), a->start = part(a, experts * sizeof *a->start);
    a->next = part(a, slots * sizeof *a->next), a->before = part(a, slots * sizeof *a->before);
    a->reach = part(a, tokens * sizeof *a->reach), a->reached = part(a, tokens * sizeof *a->reached);
    a->token_hops = part(a, tokens * sizeof *a->token_hops), a->to = part(a, tokens * sizeof *a->to);
    a->seen = part(a, tokens), a->state = part(a, experts);
    a->distance = part(a, experts * sizeof *a->distance), a->sum = part(a, padded * sizeof *a->sum);
    a->head = part(a, experts * sizeof *a->head), a->hops = part(a, experts * sizeof *a->hops);
    a->parent = part(a, experts * sizeof *a->parent), a->sibling = part(a, experts * sizeof *a->sibling);
    a->parent_cost = part(a, experts * sizeof *a->parent_cost);
    a->at = part(a, experts * sizeof *a->at), a->costs = part(a, experts * sizeof *a->costs);
    a->taken = part(a, experts * sizeof *a->taken), a->given = part(a, experts * sizeof *a->given);
    a->row = part(a, padded * sizeof *a->row), a->place = part(a, tokens * sizeof *a->place);
    a->kept = part(a, a->most_rows * padded * sizeof *a->kept);
    a->heap = malloc(a->heap_size * sizeof *a->heap);
    int done = a->failed || !a->heap ? -1 : 1;
    if (done > 0) {
        for (int64_t j = 0; j < padded; ++j) a->g[j] = j < experts ? bias[j] : -INFINITY;
        for (int64_t i = 0; i < tokens; ++i) a->place[i] = -1, a->reach[i] = INFINITY, a->seen[i] = 0;
        if (to->part == START) settle(a), to->part = ABOVE;
        done = balance(a, lower, upper, to);
        int rounding = done > 0 && round;
        for (int64_t j = 0; j < experts; ++j)
            rounding = rounding && upper[j] - lower[j] <= 1 && counts[j] >= lower[j] && counts[j] <= upper[j];
        if (rounding) done = choose_rounding(a, lower, upper);
        for (int64_t j = 0; j < experts; ++j) bias[j] = a->g[j];
    }
    to->moves += a->moves;
    free(a->heap);
    for (int n = 0; n < a->part_count; ++n) free(a->parts[n]);
    return done;
}
