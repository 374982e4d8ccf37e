"""A picture of the layers' errors."""

from __future__ import annotations

import io

from llm_quantize.blockwise.layer_report import LayerReport

LEGEND_LINES = 16  # that a legend holds before they stop being told apart


def plot_errors(layers: list[LayerReport]) -> bytes | None:
    """A PNG of the layers' errors by block; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    kinds: dict[str, list[tuple[int, float]]] = {}
    for position, each in enumerate(layers):
        parts = each.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        kind = ".".join(parts[number + 1 :]) if number is not None else each.name
        kinds.setdefault(kind, []).append(
            (int(parts[number]) if number is not None else position, each.error)
        )
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, points in sorted(kinds.items()):
        blocks, errors = zip(*sorted(points), strict=True)
        positive = [max(error, 1e-12) for error in errors]  # a logarithm has no place for zero
        axes.plot(blocks, positive, marker="o", markersize=3, linewidth=1, label=kind)
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("relative squared output error")
    axes.grid(visible=True, which="both", linewidth=0.3)
    if len(kinds) <= LEGEND_LINES:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
