"""Attacks on text: seeded changes of the evaluation text that a robust model should bear.

An attack changes the text itself, hence inputs and targets alike. `attack_text(name, data, seed, vocabulary,
**options)` runs one of those that `list_attacks()` names, on bytes or on the ids of a vocabulary. A new attack is one
file, one line in `registry.py` for bytes and one for word ids. Attacks on images stand in `attacks.images`.
"""

from sinkroute.lab.attacks.registry import ATTACKS, WORD_ATTACKS, attack_text, list_attacks

__all__ = ["ATTACKS", "WORD_ATTACKS", "attack_text", "list_attacks"]
