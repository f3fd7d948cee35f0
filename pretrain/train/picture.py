"""How the project's pictures look: one row of plots, without a frame, over a light grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def drawing(path: Path, width: float, columns: int = 1) -> "Iterator[list[Axes]]":
    """Empty plots side by side, which are written to a PNG file when the block ends.

    Args:
        path: The file.
        width: Width of the picture in inches; it is 3.6 high.
        columns: Number of plots.

    Raises:
        UserError: If the directory of ``path`` does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(
            f"{path}: there is no directory {path.parent}; make it first, or choose another for the picture"
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, 3.6), layout="constrained", squeeze=False)
    try:
        yield list(axes[0])
        for plot in axes[0]:
            plot.spines[["top", "right"]].set_visible(False)
            plot.grid(alpha=0.3)
        figure.savefig(path, dpi=150, format="png")
    finally:
        plt.close(figure)
