"""How the project's pictures look: plots without a frame, over a light grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import UserError
from pretrain.files import atomic_path, check_suffix, only_writer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_SUFFIX = ".png"


@contextmanager
def drawing(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1) -> "Iterator[list[Axes]]":
    """Empty plots, row by row, which are written to a PNG file, or replace it, when the block ends.

    Args:
        path: The file.
        size: Width and height of the picture in inches.
        rows: Plots above each other.
        columns: Plots side by side.

    Raises:
        UserError: If ``path`` does not end in ``.png``, or cannot be written.
    """
    check_suffix(path, PICTURE_SUFFIX)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    plots = list(grid.flat)
    try:
        yield plots
        for plot in plots:
            plot.spines[["top", "right"]].set_visible(False)
            plot.grid(alpha=0.3)
            plot.set_axisbelow(True)
        with only_writer(path), atomic_path(path, replace=True) as partial:
            figure.savefig(partial, dpi=150, format="png")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        plt.close(figure)
