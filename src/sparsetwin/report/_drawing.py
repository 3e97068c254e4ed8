"""Figures as SVG within the page: the same bytes every time, in the page's own fonts and colours.

A colour is a name that the page's style sheet defines for light and for dark screens. matplotlib knows only fixed
colours, so each name is drawn in a stand-in and put back in the finished SVG.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sparsetwin.report._markup import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#0a0001"
MUTED = "#0a0002"
RULE = "#0a0003"
SHADE = "#0a0004"
DENSE = "#0a0005"
SPARSE = "#0a0006"
BRANCH = "#0a0007"
SERIES = tuple(f"#0a001{index}" for index in range(6))

_NAMES = {INK: "ink", MUTED: "muted", RULE: "rule", SHADE: "shade", DENSE: "dense", SPARSE: "sparse", BRANCH: "branch"}
_NAMES |= {colour: f"series-{index}" for index, colour in enumerate(SERIES)}
BRANCH_STYLE = (0, (2, 1.2))
LINE_STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 2)), (0, (4, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

_RC: dict[Any, Any] = {  # newer type stubs list all names, older ones take any string
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and set in the page's font
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.labelsize": 11.5,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


def draw(
    name: str, paint: Callable[["Figure"], None], *, title: str, description: str, width: int = 510, height: int = 290
) -> Markup:
    """Return a figure as SVG.

    Args:
        name: Unique on the page; letters, digits and hyphens.
        paint: Draws into an empty figure.
        title: Its name for those who do not see it.
        description: What it shows, in words.
        width: In CSS pixels.
        height: In CSS pixels.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts set the text, not matplotlib's
        matplotlib.rcdefaults()  # a user's matplotlibrc shall not change the page
        matplotlib.rcParams.update(_RC)
        matplotlib.rcParams["svg.hashsalt"] = name
        drawn = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(drawn)
        paint(drawn)
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name=name, title=title, description=description, width=width, height=height)


def plot_line(axes: "Axes", xs: Sequence[float], ys: Sequence[float], **style: object) -> None:
    """Draw a line, with a dot where it is a single point."""
    marker = {"marker": "o"} if len(xs) == 1 and "marker" not in style else {}
    axes.plot(xs, ys, **marker, **style)  # type: ignore[arg-type]


def legend_text(name: str) -> str:
    """Return a name as a legend shows it; matplotlib would hide one that begins with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def legend_above(axes: "Axes", columns: int = 3) -> None:
    """Place the legend over the axes, where it hides nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def loss_axis(axes: "Axes", losses: Iterable[float]) -> None:
    """Make the y axis one of losses: logarithmic where they span a factor of four or more.

    Args:
        axes: With its lines drawn.
        losses: Those of all lines; what is not finite and positive has no place on the axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = [loss for loss in losses if 0 < loss < math.inf]
    if values and max(values) >= 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel("loss, logarithmic")
    else:
        axes.set_ylabel("loss")


def _inline(svg: str, *, name: str, title: str, description: str, width: int, height: int) -> Markup:
    body = svg[svg.index("<svg") : svg.rindex("</svg>")]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)  # ids are the page's, not the drawing's
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    for colour, variable in _NAMES.items():
        body = body.replace(colour, f"var(--{variable})")
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" style="min-width: {0.74 * width:g}px; max-width: {1.1 * width:g}px" '
        f'role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>{body}</svg>'
    )
