"""The picture of an explained sample: a row for every value, as computed, as it should have been, and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.explanation.panels import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PALE,
    Scale,
    bare,
    draw_value,
    shape_text,
    write_text,
)
from fxinvert.explanation.result import Cut, Explanation, Value
from fxinvert.labels import is_classification

#: values, and attention ops, that are shown
ROWS, ATTENTION_ROWS = 10, 4
#: outputs that bars are shown for
BARS = 64
WIDTH, ROW_HEIGHT, HEAD_HEIGHT = 12.0, 1.15, 2.5


@dataclass(frozen=True)
class Row:
    """One row: a title, a remark under it, and the two values `(…)` of the sample."""

    title: str
    remarks: tuple[str, ...]
    computed: Tensor
    wanted: Tensor
    strong: bool = True


def draw(explanation: Explanation, sample: int, number: int) -> Figure:
    """The picture of one sample, called by a number; rows beyond `ROWS` are left out, those with the smallest shares first."""
    rows, left_out = _rows(explanation, sample)
    attention = [
        Row(
            f"attention, {a.name.rpartition('.')[0] or a.name}",
            ("weights, by head", "should have: from the target of", a.cut),
            a.anchor[sample],
            a.target[sample],
        )
        for a in explanation.attention[:ATTENTION_ROWS]
    ]
    total = len(rows) + len(attention)
    height = HEAD_HEIGHT + ROW_HEIGHT * total + 1.15
    figure = Figure(figsize=(WIDTH, height), dpi=100, facecolor="white")
    grid = GridSpec(
        2,
        1,
        figure=figure,
        height_ratios=[HEAD_HEIGHT, max(ROW_HEIGHT * total, 0.1)],
        left=0.02,
        right=0.985,
        top=1 - 0.8 / height,
        bottom=0.25 / height,
        hspace=0.75 / height * 2,
    )
    title = f"Sample {number}: {_verdict(explanation, sample)}"
    figure.text(
        0.02, 1 - 0.16 / height, title, fontsize=13, weight="bold", color=INK, va="top", parse_math=False
    )
    _head(figure, grid[0], explanation, sample)
    body = grid[1].subgridspec(max(total, 1), 4, width_ratios=[1.15, 1.6, 1.6, 1.6], hspace=0.45, wspace=0.08)
    for index, row in enumerate([*rows, *attention]):
        _draw_row(figure, body, index, row)
    if left_out:
        note = f"{left_out} more values are left out, those with the smallest shares."
        figure.text(0.02, 0.08 / height, note, fontsize=8, color=MUTED, va="bottom")
    return figure


def write(figure: Figure, path: Path) -> Path:
    """Writes a picture, the same bytes every time.

    Raises:
        DataError: the file cannot be written, or its ending is unknown.
    """
    from matplotlib import rc_context

    suffix = path.suffix.lower().lstrip(".")
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
    }
    if suffix not in metadata:
        raise DataError(f"pictures are written as {', '.join(metadata)}; {path.name} ends otherwise")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "fxinvert"}):
            figure.savefig(path, format=suffix, metadata=metadata[suffix])
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _rows(explanation: Explanation, sample: int) -> tuple[list[Row], int]:
    """The rows in the order of the graph, and how many are left out."""
    found: list[tuple[float, Row]] = []
    for cut in explanation.cuts:
        found += [(-1 / (1 + float(v.moved[sample])), _inner(v, sample)) for v in cut.inside]
        found.append((float(cut.share[sample].abs()) + 1e-9, _cut_row(cut, sample)))
    kept = sorted(sorted(range(len(found)), key=lambda i: -found[i][0])[:ROWS])
    return [found[i][1] for i in kept], len(found) - len(kept)


def _cut_row(cut: Cut, sample: int) -> Row:
    title = cut.segment if cut.segment == cut.name else f"{cut.segment} → {cut.name}"
    share, moved = float(cut.share[sample]), float(cut.moved[sample])
    remarks = (
        f"{100 * share:.0f} % of the output error",
        f"to be moved by {100 * moved:.1f} %",
        f"{cut.op}, {shape_text(cut.shape)}",
    )
    return Row(title, remarks, *cut.pair(sample))


def _inner(value: Value, sample: int) -> Row:
    remarks = (
        f"to be moved by {100 * float(value.moved[sample]):.1f} %",
        f"{value.op}, {shape_text(value.shape)}",
    )
    return Row(f"inside: {value.name}", remarks, *value.pair(sample), strong=False)


def _draw_row(figure: Figure, body: Any, index: int, row: Row) -> None:
    label = figure.add_subplot(body[index, 0])
    bare(label)
    write_text(label, row.title, row.remarks, row.strong)
    blocks = [body[index, column] for column in (1, 2, 3)]
    titles = ("computed", "should have computed", "difference") if index == 0 else (None,) * 3
    draw_value(figure, blocks, Scale.of(row.computed, row.wanted), titles)


def _head(figure: Figure, spec: SubplotSpec, explanation: Explanation, sample: int) -> None:
    """What went in, what came out, and where a correction accounts for how much."""
    inputs = explanation.inputs[:2]
    cells = spec.subgridspec(1, len(inputs) + 2, width_ratios=[1.1] * len(inputs) + [1.7, 1.9], wspace=0.3)
    for index, value in enumerate(inputs):
        axes = figure.add_subplot(cells[0, index])
        _input(axes, value, sample)
    _outputs(figure.add_subplot(cells[0, len(inputs)]), explanation, sample)
    _shares(figure.add_subplot(cells[0, len(inputs) + 1]), explanation, sample)


def _input(axes: Axes, value: Value, sample: int) -> None:
    bare(axes)
    axes.set_title(value.name, fontsize=10, color=INK, loc="left", parse_math=False)
    given = value.anchor[sample].detach().cpu()
    if given.dim() == 3 and given.shape[0] in (1, 3):
        picture = given.float().movedim(0, -1)
        low, high = picture.min(), picture.max()
        picture = (picture - low) / (high - low).clamp_min(1e-12)
        axes.imshow(picture.squeeze(-1).numpy(), cmap="gray")
    elif given.dim() == 1 and given.is_floating_point() and len(given) <= BARS:
        axes.bar(range(len(given)), given.float().numpy(), color=MUTED)
        axes.axhline(0, color=INK, linewidth=0.6)
    elif given.dim() <= 1:
        axes.text(
            0, 0.95, _listed(given), va="top", fontsize=8, wrap=True, transform=axes.transAxes, color=INK
        )
    else:
        axes.imshow(given.float().flatten(0, -2).numpy(), cmap="viridis", aspect="auto")


def _outputs(axes: Axes, explanation: Explanation, sample: int) -> None:
    axes.set_title("output", fontsize=10, color=INK, loc="left")
    computed = explanation.output[sample].detach().double().cpu()
    wanted = explanation.output_target[sample].detach().double().cpu()
    if computed.dim() > 1 or computed.numel() > BARS:
        bare(axes)
        text = f"{shape_text(computed.shape)} values,\nshown in the last row"
        axes.text(0, 0.95, text, va="top", fontsize=9, color=MUTED, transform=axes.transAxes)
        return
    places = torch.arange(computed.numel()).numpy()
    axes.bar(places - 0.2, computed.flatten().numpy(), 0.4, color=MUTED, label="computed")
    axes.bar(places + 0.2, wanted.flatten().numpy(), 0.4, color=ORANGE, label="should have")
    axes.axhline(0, color=INK, linewidth=0.6)
    names = [str(i) for i in places.tolist()]
    heads = explanation.heads.heads
    if heads and all(head.size == 1 for head in heads):
        names = [str(head.key) for head in heads]
    axes.set_xticks(places, names) if len(names) <= 20 else axes.set_xticks([])
    for label in axes.get_xticklabels():
        label.set_parse_math(False)
    _quiet(axes)
    axes.legend(fontsize=7, frameon=False, loc="best", handlelength=1)


def _shares(axes: Axes, explanation: Explanation, sample: int) -> None:
    axes.set_title("share of the output error", fontsize=10, color=INK, loc="left")
    cuts = sorted(explanation.cuts, key=lambda cut: -float(cut.share[sample].abs()))[:ROWS]
    cuts = [cut for cut in explanation.cuts if cut in cuts]
    shares = [100 * float(cut.share[sample]) for cut in cuts]
    places = list(range(len(cuts)))[::-1]
    axes.barh(places, shares, color=[BLUE if share >= 0 else ORANGE for share in shares], height=0.7)
    end = max([*shares, 1.0])
    for place, cut, share in zip(places, cuts, shares, strict=True):
        text = f"{cut.segment}  {share:.0f} %"
        axes.text(
            max(share, 0) + 0.02 * end, place, text, va="center", fontsize=8, color=INK, parse_math=False
        )
    axes.set_xlim(min([*shares, 0.0]), 1.75 * end)
    axes.set_yticks([])
    axes.set_xticks([])
    _quiet(axes)
    axes.spines["bottom"].set_visible(False)


def _verdict(explanation: Explanation, sample: int) -> str:
    if not float(explanation.error[sample]):
        return "the output is what it should be; nothing to correct"
    if explanation.classes is not None and explanation.predicted is not None:
        own, answered = int(explanation.classes[sample]), int(explanation.predicted[sample])
        if own != answered:
            return f"answered class {answered}, should be {own}"
        return f"class {own}, answered rightly, with less margin than wanted"
    pairs = explanation.heads.pairs(explanation.output, explanation.labels)
    if all(not is_classification(labels) and output[sample].numel() == 1 for output, labels in pairs):
        names = [str(head.key) for head in explanation.heads.heads] or ["output"]
        told = [
            f"{name} {float(output[sample]):.3g}, should be {float(labels[sample]):.3g}"
            for name, (output, labels) in zip(names, pairs, strict=True)
        ]
        return "; ".join(told)
    return f"the output is {100 * float(explanation.error[sample]):.1f} % away from its target"


def _listed(values: Tensor) -> str:
    numbers: Sequence[Any] = values.flatten().tolist()
    shown = ", ".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in numbers[:48])
    return shown + (", …" if len(numbers) > 48 else "")


def _quiet(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
