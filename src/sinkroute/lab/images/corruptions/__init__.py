"""Common corruptions of images: noise, blur, weather and digital artefacts at five severities, and their summary, mCE.

D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
https://arxiv.org/abs/1903.12261: 15 corruptions make the benchmark, 4 more (`list_corruptions(extra=True)`) were
published for whatever must not be tuned on those. Each is written anew here from its published description and
constants; where one deviates, its docstring says so.

- `corrupt(name, images, severity, seed)` corrupts a batch of uint8 images, or one image.
- `mce`, `relative_mce` and `mean_corruption_error` summarise a model's errors on them.

Shapes: B images of a batch, C channels (1: grey, 3: RGB), H rows, W columns. A new corruption is one function and one
entry in `registry.py`, which holds the severities.
"""

from sinkroute.lab.images.corruptions.mce import ALEXNET, ALEXNET_CLEAN, mce, mean_corruption_error, relative_mce
from sinkroute.lab.images.corruptions.registry import CORRUPTIONS, corrupt, list_corruptions

__all__ = [
    "ALEXNET",
    "ALEXNET_CLEAN",
    "CORRUPTIONS",
    "corrupt",
    "list_corruptions",
    "mce",
    "mean_corruption_error",
    "relative_mce",
]
