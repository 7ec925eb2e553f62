"""Writing a table three times: CSV with full numbers, Markdown and LaTeX in the paper's layout."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from common import Results
from scores import Curve, Summary, benchmarks

Mark = Literal["", "best", "second"]
MARKDOWN = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}
LATEX = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
SYMBOLS = {
    **{c: "\\" + c for c in "&%#_$"},
    "×": r"$\times$", "δ": r"$\delta$", "ρ": r"$\rho$", "π": r"$\pi$", "μ": r"$\mu$", "ε": r"$\varepsilon$",
    "≤": r"$\leq$", "−": "$-$", "–": "--", "ₜ": "$_t$", ">": "$>$", "<": "$<$", "|": r"$\vert$", "Σ": r"$\Sigma$",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A marked text and an unmarked note behind it."""

    text: str
    note: str = ""
    mark: Mark = ""


def write(
    out: Path,
    name: str,
    caption: str,
    header: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[Cell | str]],
    records: Sequence[Mapping[str, object]],
    lines: Sequence[int] = (),
) -> None:
    """<name>.csv from `records`, <name>.md and .tex from `rows` under `header` (group, column).

    Equal groups side by side share one heading in LaTeX. lines: rows that get a rule above.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in record.items()} for record in records)
    cells = [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows]
    (out / f"{name}.md").write_text(_markdown(caption, header, cells), encoding="utf-8")
    (out / f"{name}.tex").write_text(_latex(name, caption, header, cells, lines), encoding="utf-8")
    print(f"wrote {out / name}.csv, .md and .tex")


def _markdown(caption: str, header: Sequence[tuple[str, str]], cells: Sequence[Sequence[Cell]]) -> str:
    def row(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    def text(c: Cell) -> str:
        return MARKDOWN[c.mark].format(c.text) + (f" {c.note}" if c.note else "")

    heads = [": ".join(part for part in pair if part) for pair in header]
    body = [row(heads), row(["---"] * len(heads)), *(row([text(c) for c in line]) for line in cells)]
    return "\n".join([*body, "", caption, ""])


def _latex(
    name: str, caption: str, header: Sequence[tuple[str, str]], cells: Sequence[Sequence[Cell]], lines: Sequence[int]
) -> str:
    def text(c: Cell) -> str:
        return LATEX[c.mark].format(escape(c.text)) + (f" {escape(c.note)}" if c.note else "")

    spans = [(group, len(list(same))) for group, same in groupby(header, key=lambda pair: pair[0])]
    heads = []
    if any(group for group, _ in spans):
        heads.append(" & ".join(rf"\multicolumn{{{n}}}{{c}}{{{escape(g)}}}" if n > 1 else escape(g) for g, n in spans))
    heads.append(" & ".join(escape(column) for _, column in header))
    body = [
        (r"\midrule" + "\n" if n in lines else "") + " & ".join(text(c) for c in row) for n, row in enumerate(cells)
    ]
    return "\n".join(
        [
            "% needs booktabs and graphicx",
            r"\begin{table}",
            rf"\caption{{{escape(caption)}}}",
            rf"\label{{tab:{name}}}",
            r"\centering",
            *([r"\resizebox{\textwidth}{!}{%"] if len(header) > 6 else []),
            rf"\begin{{tabular}}{{{'l' + 'c' * (len(header) - 1)}}}",
            r"\toprule",
            *(head + r" \\" for head in heads),
            r"\midrule",
            *(row + r" \\" for row in body),
            r"\bottomrule",
            r"\end{tabular}" + ("}" if len(header) > 6 else ""),
            r"\end{table}",
            "",
        ]
    )


def escape(text: str) -> str:
    """Text for LaTeX.

    >>> escape("50% of w_t")
    '50\\\\% of w\\\\_t'
    """
    return "".join(SYMBOLS.get(c, c) for c in text)


def bracket(summary: Summary) -> str:
    """[low, high] in percent; nothing for one run without an interval."""
    if summary.seeds == 1 and summary.low == summary.high:
        return ""
    return f"[{100 * summary.low:.1f}, {100 * summary.high:.1f}]"


def percent(summary: Summary, prefix: str) -> dict[str, object]:
    """The summary as CSV columns, in percent."""
    values = {"": summary.mean, "_low": summary.low, "_high": summary.high}
    return {prefix + end: 100 * value for end, value in values.items()}


def marks(means: Mapping[str, float]) -> dict[str, Mark]:
    """Which keys have the best and the second-best mean (equal means share a mark).

    >>> marks({"a": 1.0, "b": 3.0, "c": 2.0})
    {'a': '', 'b': 'best', 'c': 'second'}
    """
    order = sorted(set(means.values()), reverse=True)
    names: list[Mark] = ["best", "second"]
    rank = dict(zip(order, names, strict=False))
    return {key: rank.get(mean, "") for key, mean in means.items()}


def collapses(curve: Curve) -> list[int]:
    """Steps at which runs collapsed, sorted."""
    return sorted(iteration for iteration in curve.collapsed if iteration is not None)


def lost(curve: Curve) -> bool:
    """Whether every run collapsed."""
    return len(collapses(curve)) == len(curve.seeds)


def collapse_at(curve: Curve) -> str:
    """The paper's entry for a rule that always collapsed: collapse@k."""
    return "collapse@" + ", ".join(str(iteration) for iteration in sorted(set(collapses(curve))))


def score_cell(summary: Summary, curve: Curve | None, mark: Mark) -> Cell:
    """Mean, spread, and how many runs of `curve` (if given) collapsed."""
    count = len(collapses(curve)) if curve else 0
    flag = f"({count}/{summary.seeds} collapsed)" if count else ""
    return Cell(f"{100 * summary.mean:.1f}", " ".join(text for text in (bracket(summary), flag) if text), mark)


def protocol(results: Results) -> str:
    """The caption's sentences on how scores were made and what cells show."""
    suite = results.suite
    seeds, k = [str(seed) for seed in suite["seeds"]], suite["evaluation"]["samples"]
    sizes = []
    for setting in suite["settings"]:
        counts = [b["problems"] for b in suite["settings"][setting]["task"]["benchmarks"]]
        same = len(set(counts)) == 1
        sizes.append(f"{len(counts)} benchmarks of {counts[0]}" if same else " + ".join(str(c) for c in counts))
    problems = sizes[0] if len(set(sizes)) == 1 else "; ".join(sizes)
    if results.ranked:
        cell = (
            "Cells: mean over seeds [95% hierarchical bootstrap interval over seeds, problems and samples]; "
            "best mean bold, second underlined, rules with a collapsed run left out."
        )
    elif len(seeds) > 1:
        cell = "Cells: mean over seeds [min, max]; no ranking with fewer than 5 seeds."
    else:
        cell = "Cells: one run each; no ranking with fewer than 5 seeds."
    return (
        f"Scores in percent: unweighted mean of the benchmarks' Avg@{k} ({problems} problems, {k} samples each). "
        f"Seeds: {len(seeds)} ({', '.join(seeds)}). {cell} "
        "The warm start (Base) is shared: seeds vary the reinforcement learning only."
    )


def all_benchmarks(results: Results) -> list[str]:
    """Names of the benchmarks of all settings, each once, in order."""
    return list(dict.fromkeys(name for setting in results.suite["settings"] for name in benchmarks(results, setting)))


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
