"""The operations that cost time, one file each: the torch reference, C for a CPU and Triton for a GPU beside it.

    `column_sums`   what a plan gives to every expert: one pass over the logits
    `plan_topk`     the K best experts of each row of a plan, and their weights
    `topk`          the K best experts of each row of numbers, with ties drawn or noise added
    `edge_topk`     a top-k, and the experts that tokens are at the edge of
    `choose`        the top-k of C + bias, its loads, and how far every expert is from its target
    `repair`        loads into bounds by the cheapest chains of moves
    `search`        a whole solve without the host, on a GPU
    `normal`        normal numbers that are a function of a seed

Every operation says what it computes for the floors above; which backend does the work, `backend` decides, and whether
a tensor is plain memory that a backend may read, `storage`. `operations` shows tracers one opaque call.

    `rows`      what the operations read: logits, the cost, the mask and the mass
    `native`    the C sources, how they are compiled, and what their functions take
    `gpu`       the Triton kernels

Shape suffixes:

    T  tokens, R a part of them, S a sample of them
    E  experts
    K  experts per token
"""
