"""Attacks on text: seeded changes of the evaluation text that a robust model should bear.

An attack changes the text itself, hence inputs and targets alike. `attack_text("word-swap", data, seed, vocabulary,
rate=...)` runs it on bytes or on the ids of a vocabulary. Attacks on images stand in `attacks.images`.
"""

from sinkroute.lab.attacks.text import attack_text

__all__ = ["attack_text"]
