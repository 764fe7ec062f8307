"""The parts every page is made of: escaped text, tables, bars, one style for light and dark, and no script.

A page is one file. Its content security policy forbids every request and every script, so that a name from a model
could do nothing even if it were not escaped; it is.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f7f9; --ink: #1c2330; --soft: #5d6778; --line: #d9dee6;
  --empty: #dfe4ec; --c0: #2563a8; --c1: #c2600c; --c2: #2f8050; --c3: #7b4ba0; --c4: #b3364b; --c5: #6b6f1f;
  --good: #1f7a43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12161d; --card: #1a202a; --ink: #e6eaf1; --soft: #9aa5b7; --line: #303a49; --empty: #2c3543;
  --c0: #6aa9f0; --c1: #f29b4b; --c2: #6cc38f; --c3: #b993e0; --c4: #f0808f; --c5: #c5c86a;
  --good: #6cc38f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.4rem 0 .6rem; font-size: 1.2rem; }
h3 { margin: 1.2rem 0 .3rem; font-size: 1rem; } p { margin: .4rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th, td { overflow-wrap: normal; } td code { overflow-wrap: anywhere; } td:first-child { min-width: 8rem; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.45rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.bar { display: inline-block; width: 9rem; height: .6rem; background: var(--empty); border-radius: .3rem;
  overflow: hidden; vertical-align: middle; } .bar i { display: block; height: 100%; background: var(--c0); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem;
  white-space: pre-wrap; } code, pre { font: 13px/1.45 ui-monospace, monospace; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
figure { margin: .5rem 0 1rem; } figure svg, figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; } img { image-rendering: pixelated; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object) -> str:
    """Any value as text that is no markup. Characters that no HTML may hold become question marks.

    >>> text("<b> & 'x'")
    '&lt;b&gt; &amp; &#x27;x&#x27;'
    """
    return html.escape(printable(value, "\t\n"))


def printable(value: object, also: str = "") -> str:
    """Text without control characters, half surrogates and marks that turn the direction of writing.

    >>> printable("a\\x00b")
    'a?b'
    """
    return "".join(c if c in also or c.isprintable() else "?" for c in str(value))


def page(title: str, sections: Iterable[str]) -> str:
    """A whole document from finished sections. Well-formed XML as well, so that any parser reads it."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(s for s in sections if s)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what belongs under it; nothing where there is nothing."""
    inner = "\n".join(p for p in parts if p)
    return f"<section>\n<h2>{text(title)}</h2>\n{inner}\n</section>" if inner else ""


def paragraph(words: object, style: str = "") -> str:
    """Plain words."""
    return f'<p class="{style}">{text(words)}</p>' if style else f"<p>{text(words)}</p>"


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """(label, large figure, small words) side by side."""
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span class="soft">{text(label)}</span><b>{text(figure)}</b>'
            f'<span class="soft">{text(words)}</span></div>'
            for label, figure, words in items
        )
        + "</div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """Cells are escaped unless they are :class:`Markup`. ``numbers``: columns that are aligned to the right."""

    def cell(tag: str, i: int, value: object) -> str:
        inner = value if isinstance(value, Markup) else text(value)
        return f'<{tag} class="n">{inner}</{tag}>' if i in numbers else f"<{tag}>{inner}</{tag}>"

    def row(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(cell(tag, i, v) for i, v in enumerate(values)) + "</tr>"

    body = [row("td", r) for r in rows]
    if not body:
        return ""
    top = f"<thead>{row('th', head)}</thead>" if any(head) else ""
    return f'<div class="wide"><table>{top}<tbody>\n' + "\n".join(body) + "\n</tbody></table></div>"


class Markup(str):
    """Text that is markup already, made here and nowhere else."""


def bar(share: float) -> Markup:
    """A small bar, filled to ``share``."""
    filled = 100 * min(1.0, max(0.0, share))
    return Markup(f'<span class="bar"><i style="width:{filled:.1f}%"></i></span>')


def code(words: object) -> Markup:
    """Names and hashes."""
    return Markup(f"<code>{text(words)}</code>")


def verdict(good: bool, words: str) -> Markup:
    """A word in the colour of good or bad; the word says it too."""
    return Markup(f'<span class="{"good" if good else "bad"}">{text(words)}</span>')


def fold(summary: str, inner: str) -> str:
    """Long lists, closed at first."""
    return f"<details><summary>{text(summary)}</summary>\n{inner}\n</details>" if inner else ""


def figure(svg: str, caption: str) -> str:
    """A drawing of :mod:`fxprune.report.plots` and what it shows."""
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>" if svg else ""


def picture(png: bytes, caption: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text(caption)}"/>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
