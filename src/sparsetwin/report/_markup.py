"""Pieces of HTML. What comes in as `str` is text and is escaped here; what is `Markup` has been."""

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NewType

Markup = NewType("Markup", str)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="generator" content="sparsetwin">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, body: Iterable[Markup]) -> str:
    """Return a whole page that needs no other file, and may load none."""
    style = files("sparsetwin.report").joinpath("_page.css").read_text(encoding="utf-8")
    return _PAGE.format(title=html.escape(title), style=style, body="\n".join(body))


def text(content: str) -> Markup:
    """Return plain text, escaped."""
    return Markup(html.escape(content))


def tag(name: str, *content: Markup, css: str = "") -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        content: What it holds.
        css: Its classes.
    """
    classes = f' class="{html.escape(css)}"' if css else ""
    return Markup(f"<{name}{classes}>{''.join(content)}</{name}>")


def paragraph(content: str, *, css: str = "") -> Markup:
    """Return a paragraph of plain text."""
    return tag("p", text(content), css=css)


def section(heading: str, *content: Markup, rank: int = 2) -> Markup:
    """Return a section under a heading of ``rank`` 1 to 6; a section without content is left out."""
    found = [piece for piece in content if piece]
    return tag("section", tag(f"h{rank}", text(heading)), *found) if found else Markup("")


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> Markup:
    """Return a table that scrolls within itself where the screen is narrow.

    Args:
        caption: What the table shows.
        headings: One a column.
        rows: Plain text, one a column; the first heads its row.
        texts: So many columns from the left hold words; the others hold numbers and are set to the right.
    """
    head = "".join(f'<th scope="col"{_align(i, texts)}>{html.escape(name)}</th>' for i, name in enumerate(headings))
    body = "\n".join(f"<tr>{_row(row, texts)}</tr>" for row in rows)
    return Markup(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(caption)}"><table>'
        f"<caption><span>{html.escape(caption)}</span></caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(drawing: Markup, caption: str) -> Markup:
    """Return a drawing with its caption."""
    scrolled = Markup(f'<div class="scroll" role="region" tabindex="0" aria-label="Figure">{drawing}</div>')
    return tag("figure", scrolled, tag("figcaption", text(caption)))


def side_by_side(*content: Markup) -> Markup:
    """Return pieces next to each other where the screen is wide enough; nothing if there are none."""
    return tag("div", *content, css="beside") if any(content) else Markup("")


def details(summary: str, *content: Markup) -> Markup:
    """Return what opens on demand."""
    return tag("details", tag("summary", text(summary)), *content)


def facts(entries: Iterable[tuple[str, str]]) -> Markup:
    """Return a list of names and what they are."""
    return tag("dl", *(Markup(f"<div>{tag('dt', text(a))}{tag('dd', text(b))}</div>") for a, b in entries))


def code(content: str) -> Markup:
    """Return a command or a listing as it is."""
    return Markup(f'<pre tabindex="0"><code>{html.escape(content)}</code></pre>')


def _row(row: Sequence[str], texts: int) -> str:
    first = f'<th scope="row">{html.escape(row[0])}</th>'
    return first + "".join(f"<td{_align(i, texts)}>{html.escape(cell)}</td>" for i, cell in enumerate(row) if i)


def _align(column: int, texts: int) -> str:
    return "" if column < texts else ' class="number"'
