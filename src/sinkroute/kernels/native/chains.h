/* What a repair of an assignment holds (chains.c): its arrays, the heap of its searches, the lists of an expert's choices.
 *
 * A slot is a place of `chosen`. The slots of an expert whose choices are linked are a list from `head`, by `next` and
 * `before`. The heap gives the nearest item first, and of equally near ones that of fewest moves.
 */
#ifndef SINKROUTE_CHAINS_H
#define SINKROUTE_CHAINS_H

#include "row.h"

typedef struct {
    double distance;
    int32_t hops, node; /* an expert, or experts + a token */
} Item;

typedef struct {
    const Rows *s;
    int64_t experts, padded, k, moves, work;
    double room; /* that is left */
    int64_t *chosen, *counts; /* (tokens, k) and (experts,), of the caller */
    double *g, *u;            /* (padded,) the bias; (tokens,) */
    int64_t *spare;           /* (experts,) choices that an expert can give, or, below 0, take */
    double *start;            /* (experts,) distance at which those begin that give */
    double worth;             /* g and distance together are less than this for those that may take */
    /* A slot is a place of `chosen`. */
    float *cost;           /* (tokens * k,) of the expert in the slot */
    int32_t *next, *before; /* (tokens * k,) the slots with the same expert; -1 at the ends */
    /* Tokens. */
    double *reach; /* their distance; INFINITY between two rounds */
    int32_t *reached; /* which of them are */
    int64_t reached_count;
    int32_t *token_hops, *to; /* to: the expert to look at next */
    uint8_t *seen;
    /* Experts. */
    double *distance;
    float *sum; /* (padded,) g + distance, or a little more */
    int32_t *head, *hops, *at; /* at: the slot to look at next */
    /* By which token an expert is reached; while no two paths are equally short, no other has to be looked for. */
    int32_t *parent, *sibling;
    float *parent_cost;
    int tied;
    int32_t *taken, *given;    /* of the chain in the making, as are `costs` */
    float *costs;
    uint8_t *state;
    float *row; /* (padded,) */
    /* Rows of a softmax, which take longer to make than to read, as far as there is place. */
    float *kept;
    int32_t *place; /* (tokens,) -1: not kept */
    int64_t kept_rows, most_rows;
    Item *heap;
    int64_t heaped, heap_size;
    void *parts[32]; /* what is allocated here */
    int part_count, failed;
} State;

static inline int earlier(double distance, int32_t hops, const Item *other) {
    return distance < other->distance || (distance == other->distance && hops < other->hops);
}

static int push(State *a, double distance, int32_t hops, int64_t node) {
    if (a->heaped == a->heap_size) {
        Item *larger = realloc(a->heap, 2 * a->heap_size * sizeof(Item));
        if (!larger) return -1;
        a->heap = larger, a->heap_size *= 2;
    }
    int64_t at = a->heaped++;
    for (int64_t above; at && earlier(distance, hops, a->heap + (above = (at - 1) / 2)); at = above)
        a->heap[at] = a->heap[above];
    a->heap[at] = (Item){distance, hops, (int32_t)node};
    return 0;
}

static Item pop(State *a) {
    Item top = a->heap[0], last = a->heap[--a->heaped];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < a->heaped; at = child) {
        Item *left = a->heap + child;
        if (child + 1 < a->heaped && earlier(left[1].distance, left[1].hops, left)) ++child;
        if (!earlier(a->heap[child].distance, a->heap[child].hops, &last)) break;
        a->heap[at] = a->heap[child];
    }
    a->heap[at] = last;
    return top;
}

static void hold(State *a, int64_t slot, int64_t j) {
    a->before[slot] = -1, a->next[slot] = a->head[j];
    if (a->head[j] >= 0) a->before[a->head[j]] = (int32_t)slot;
    a->head[j] = (int32_t)slot;
}

static void let_go(State *a, int64_t slot) {
    if (a->before[slot] >= 0) a->next[a->before[slot]] = a->next[slot];
    else a->head[a->chosen[slot]] = a->next[slot];
    if (a->next[slot] >= 0) a->before[a->next[slot]] = a->before[slot];
}

static inline int has(const State *a, int64_t token, int64_t expert) {
    for (int64_t n = 0; n < a->k; ++n)
        if (a->chosen[token * a->k + n] == expert) return 1;
    return 0;
}

#endif
