"""Constants of the search for the potentials, which runs in NumPy on the host (`transport.dual`) or in Triton (`gpu`).

What they steer is told in `transport.dual`.
"""

SAMPLE_AT_LEAST, SAMPLE_PER_EXPERT = 512, 32  # rows
MEMORY = 10
REACH = 30.0  # of a first step, in units of ξ
FAR_BELOW, FAR_ABOVE = 0.1, 8.0  # s / t outside: far from balance
PATIENCE = 10  # passes in which the error must halve
ANNEAL, ANNEAL_TOLERANCE, ANNEAL_PASSES = 4.0, 0.3, 12
