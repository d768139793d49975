"""Attacks on images: changes within an L∞ ball that make a classifier err.

`attack_images(name, predict, images, labels, seed, **options)` runs one of those that `list_image_attacks()` names, on
any classifier that is a function of images. A new attack is one file and one line in `registry.py`.

Shapes: B images, C channels, H rows, W columns, N classes.
"""

from sinkroute.lab.attacks.images.registry import IMAGE_ATTACKS, attack_images, list_image_attacks

__all__ = ["IMAGE_ATTACKS", "attack_images", "list_image_attacks"]
