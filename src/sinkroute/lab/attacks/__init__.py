"""Attacks on text: seeded changes of the evaluation bytes that a robust model should bear.

An attack changes the text itself, hence inputs and targets alike. `attack_text(name, data, seed, **options)` runs one
of those that `list_attacks()` names. A new attack is one file and one line in `registry.py`.
"""

from sinkroute.lab.attacks.registry import ATTACKS, attack_text, list_attacks

__all__ = ["ATTACKS", "attack_text", "list_attacks"]
