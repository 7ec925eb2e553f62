"""The columns of a suite's tables, and how a table is read: the only check of a CSV file for the package and the figures.

Imports pandas and nothing heavier, so that the scripts of `paper_figures/` start fast.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from cppo.results.provenance import PACKAGES

TABLES = ("scores", "curves", "positions", "tokens", "runs")
"""Names of the tables."""
KEY = ("run", "rule", "setting", "seed")
"""Columns that every table begins with."""
CURVES = (
    *("reward", "accuracy", "unjudged", "response_length", "truncated", "entropy", "divergence"),
    *("mask_share", "mask_share/threshold", "mask_share/budget", "mask_share/sequence", "gate_mean", "delta_b"),
    *("loss", "value_loss", "grad_norm", "relative_logprob_error", "drift", "zero_variance"),
    *("skipped_updates", "nonfinite_updates"),
)
"""Metrics of an iteration that have a column in every suite."""
COLUMNS = {
    "scores": (
        *(*KEY, "iteration", "benchmark", "problem", "correct", "samples", "unjudged"),
        *("mean_length", "truncated"),
    ),
    "curves": (*KEY, "iteration", *(name.replace("/", "_") for name in CURVES)),
    "positions": (*KEY, "iteration", "first", "last", "count", "drift", "tail"),
    "tokens": (*KEY, "iteration", "row", "position", "token", "advantage", "ratio", "reason"),
    "runs": (
        *(*KEY, "objective", "status", "iterations", "collapsed_at", "seconds"),
        *("rollout_tokens_per_second", "update_tokens_per_second", "numerics", "commit", "python", "machine"),
        *PACKAGES,
    ),
}
"""Columns that each table has at least. The table runs also has those of provenance.json, tokens those that rules show, and
curves one for every other metric."""
TEXT = frozenset(
    {
        *("run", "rule", "setting", "benchmark", "problem", "objective", "status", "token"),
        *("numerics", "commit", "python", "machine", *PACKAGES),
    }
)
"""Columns that stay text: ten hex digits may look like a number, and a rule's name or a token like a missing value. All other
columns hold numbers."""


def read_table(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """The whole table in a CSV file, which has at least these columns: `TEXT` as text, the others as numbers, empty = NaN.

    Raises ValueError, one line that names the file and where it is wrong, for a missing file, a missing column, and text where
    a number is expected.
    """
    table = parse_csv(path)
    check_columns(table, columns, path)
    return table


def parse_csv(path: Path) -> pd.DataFrame:
    """The table in a CSV file, before its columns are checked. Raises ValueError when there is no such table."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; run the suite (`snakemake`) or `python -m cppo collect` first")
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=[""])
    except (ValueError, OverflowError):
        raise ValueError(f"{path}: not a CSV table; delete it and make it again") from None
    texts = [column for column in table if column in TEXT]
    return table.fillna(dict.fromkeys(texts, ""))


def check_columns(table: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    """Raises ValueError unless the table has these columns, with numbers in those that are not `TEXT`; `path` is its file."""
    for column in columns:
        if column not in table:
            raise ValueError(f"{path}: column {column} is missing; delete it and make it again")
        if column not in TEXT:
            numbers = pd.to_numeric(table[column], errors="coerce")
            wrong = table.index[numbers.isna() & table[column].notna()]
            if len(wrong):
                value, line = table.loc[wrong[0], column], wrong[0] + 2
                raise ValueError(f"{path}:{line}: {column}: {value!r:.60} is not a number; delete it and make it again")
