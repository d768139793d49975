"""The figures of studies, each an `<svg>` for a page; importing this imports matplotlib.

`history` reads curves and loads from logs; `curves` draws them over training, `loads` the load of every expert,
`standing` one line per method, `compared` what is paired with the reference, over grids and sizes. `marks` is what they
share.
"""

from sinkroute.lab.study.figures.compared import Grid, forest_figure, grid_figure, grids, size_figure
from sinkroute.lab.study.figures.curves import balance_figure, training_figure
from sinkroute.lab.study.figures.history import Curve, curve, load_history, smooth
from sinkroute.lab.study.figures.loads import experts_figure, serving_figure
from sinkroute.lab.study.figures.standing import picture, scatter_figure, standing_figure

__all__ = [
    "Curve", "Grid", "balance_figure", "curve", "experts_figure", "forest_figure", "grid_figure", "grids",
    "load_history", "picture", "scatter_figure", "serving_figure", "size_figure", "smooth", "standing_figure",
    "training_figure",
]  # fmt: skip
