"""The frame of the pages that commands write: one file that loads nothing, dark where the reader's screen is."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ds_sft.errors import UserError

STYLE = """
:root { --ink: #1c2430; --soft: #64707f; --line: #dfe4ea; --learned: #c9f0d3; --learned-ink: #0b5a28;
  --special: #6d28d9; --paper: #ffffff; --back: #f5f7f9; --bar: #7aa7d9; --warn: #b45309; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #97a3b2; --line: #333d49;
  --learned: #14532d; --learned-ink: #bbf7d0; --special: #c4a5ff; --paper: #1a212a; --back: #11161c;
  --bar: #4b7fb8; --warn: #fbbf24; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 8px 0 4px; }
p, .soft { color: var(--soft); margin: 0 0 12px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px;
  min-width: 150px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); }
.two { display: grid; align-items: start; margin-top: 12px; grid-template-columns: 1fr 1fr; gap: 16px; }
@media (max-width: 800px) { .two { grid-template-columns: 1fr; }
}
.box { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td { padding: 3px 8px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.warn { color: var(--warn); margin: 6px 0; }
.row { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 16px; }
.row header { padding: 8px 16px; border-bottom: 1px solid var(--line); color: var(--soft); font-size: 14px;
  overflow-wrap: anywhere; }
"""


def frame(title: str, body: str, *, style: str = "", scripts: bool = False) -> str:
    """The page around `body`, which is HTML: a browser refuses to load anything for it, or to run anything unasked."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    policy += "; script-src 'unsafe-inline'; img-src data: blob:" if scripts else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
{body}
</body></html>
"""


def write_page(path: Path, text: str, flag: str) -> None:
    """Write a page where `flag` says; an earlier page is replaced, any other file is not.

    Raises:
        UserError: the file is another's, or cannot be written.
    """
    if path.is_file() and path.suffix not in (".html", ".htm"):
        raise UserError(f"{flag} {path}: is there already, and no .html: name another")
    try:
        path.write_text(text, encoding="utf-8", errors="replace")  # halves of characters that a model wrote
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from None
