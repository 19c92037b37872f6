"""How results show themselves: in a notebook as a small table in its own colours, light or dark; else as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

#: text as it is; numbers with separators or four digits, to the right
Cell = str | int | float

_TABLE = """\
<div class="fxinvert">
<style>.fxinvert { font-size: 13px } .fxinvert > div { max-height: 30em; overflow: auto } .fxinvert p { margin: 3px 0 }
.fxinvert table { border-collapse: collapse; font-size: inherit } .fxinvert td, .fxinvert th { padding: 2px 10px; text-align: left }
.fxinvert .number { text-align: right; font-variant-numeric: tabular-nums }
.fxinvert tr + tr, .fxinvert tbody { border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent) }</style>
<strong>{{ title }}</strong>
{% for note in notes %}<p>{{ note }}</p>
{% endfor -%}
<div><table>
<thead><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows -%}
<tr>{% for cell in row %}<td{% if cell is number %} class="number"{% endif %}>{{ cell | written }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody></table></div></div>"""


def table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[Cell]], notes: Iterable[str] = ()
) -> str:
    """A table as HTML; everything that it shows is escaped.

    Args:
        title: what it is.
        header: names of the columns.
        rows: one cell per column.
        notes: what is said before it, a paragraph each.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["written"] = _written
    return environment.from_string(_TABLE).render(title=title, header=header, rows=rows, notes=notes)


def _written(cell: Cell) -> str:
    match cell:
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:.4g}"
    return cell


def plain(shown: Any) -> str:
    """What rich makes of something, without colours."""
    from rich.console import Console

    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())
