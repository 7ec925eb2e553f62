"""One HTML page of the published tables and figures, made from their files: nothing is trained or drawn.

    python paper_figures/report.py results/mini results/ablations --out runs/report.html

Each argument is a folder with a suite's tables and with figures/ drawn from them. A caption is the first line of the script
that draws the item. The page holds its pictures, so it can be sent as one file.
"""

import argparse
import ast
import base64
import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import catalog

STYLE = (
    "body {max-width: 70em; margin: auto; font-family: sans-serif} img {max-width: 100%} td, th {padding: 0 1em 0 0}"
)


def page(folders: Sequence[Path]) -> str:
    """The page. Raises OSError for a file that a folder lacks."""
    body = "\n".join(part for folder in folders for part in section(folder))
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>cppo-bench</title>\n<style>{STYLE}</style>\n{body}\n'


def section(folder: Path) -> Iterator[str]:
    """One folder: what its suite is for, then every item that can be drawn from it."""
    suite: dict[str, Any] = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
        versions = sorted({row["numerics"] for row in csv.DictReader(file)})
    yield f"<h1>{escape(str(folder))}</h1>\n<p>{escape(suite['description'])}</p>"
    yield f"<p>Made by numerics version {escape(', '.join(versions))}.</p>"
    for item in catalog.available(suite):
        script = Path(__file__).with_name(f"{item}.py").read_text(encoding="utf-8")
        yield f"<h2>{escape((ast.get_docstring(ast.parse(script)) or item).splitlines()[0])}</h2>"
        for name in catalog.files(suite, item):
            path = folder / "figures" / name
            if path.suffix == ".png":
                image = base64.b64encode(path.read_bytes()).decode()
                yield f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{image}">'
            elif path.suffix == ".md":
                yield table(path.read_text(encoding="utf-8"))


def table(markdown: str) -> str:
    """A printed table (`typeset.write`) as HTML: rows between bars, then the caption."""
    text = escape(markdown, quote=False).replace("&lt;u&gt;", "<u>").replace("&lt;/u&gt;", "</u>")
    lines = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|") and not line.startswith("| ---")]
    cells = ["".join(f"<td>{cell}</td>".replace("\\|", "|") for cell in row) for row in rows]
    notes = "".join(f"<p>{line}</p>" for line in lines if line and not line.startswith("|"))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + f"</table>{notes}"


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and writes the page; 2 = a file is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders such as results/mini")
    parser.add_argument("--out", type=Path, default=Path("runs/report.html"), help="the page")
    arguments = parser.parse_args(argv)
    try:
        html = page(arguments.folders)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; draw the figures first", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(html, encoding="utf-8")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(None))
