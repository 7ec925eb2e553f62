"""What every figure and table script shares: reading a results folder, looks and names, the command line, saving.

A script is `main = script(__doc__, draw)` with `draw(results, out)`. Anything that a folder lacks is a `DataError`: one line
that names file and column, and exit code 2.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import catalog
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from cppo.results.columns import check_columns, parse_csv

RANK_FROM = 5
"""From this many seeds on, intervals are bootstrapped and rules are ranked; below, mean, minimum and maximum are shown."""


class DataError(ValueError):
    """The results folder lacks something."""


@dataclass(frozen=True)
class Look:
    """How a rule appears, in every figure and table."""

    name: str
    color: str
    marker: str


# Okabe and Ito's colours for the main rules, Tol's muted scheme for the others: distinct with any colour vision, and
# markers repeat the distinction for grey prints. The cross is kept for collapsed runs.
LOOKS: dict[str, Look] = {
    "base": Look("Base", "#7F7F7F", "_"),
    "pg": Look("PG", "#000000", "p"),
    "ppo": Look("PPO", "#CC79A7", "P"),
    "grpo": Look("GRPO", "#009E73", "s"),
    "cispo": Look("CISPO", "#E69F00", "^"),
    "minpro": Look("MinPRO", "#56B4E9", "v"),
    "trm_max": Look("TRM-Max", "#999933", "D"),
    "trm_avg": Look("TRM-Avg", "#882255", "d"),
    "dppo": Look("DPPO", "#0072B2", "o"),
    "cppo": Look("CPPO", "#D55E00", "*"),
    "cppo_no_weight": Look("CPPO w/o position weight", "#AA4499", "<"),
    "cppo_no_budget": Look("CPPO w/o prefix budget", "#117733", ">"),
    "cppo_shuffled": Look("CPPO shuffled weights", "#DDAA33", "h"),
    "cppo_shuffled_full": Look("CPPO shuffled, with budget", "#661100", "X"),
    "cppo_padded": Look("CPPO padded span", "#8C8C8C", "p"),
    "cppo_soft": Look("CPPO soft gate", "#332288", "D"),
    "cppo_budget_fixed": Look("CPPO fixed budget", "#CC6677", "8"),
    "cppo_wmin": Look("CPPO lower w_min", "#44AA99", "H"),
    "cppo_kl": Look("CPPO-KL", "#88CCEE", "v"),
    "trm_kl": Look("TRM Max&Avg", "#882255", "s"),
    "cppo_binary": Look("CPPO-Binary", "#999933", "^"),
}
EXTRA = ("#44AA99", "#AA4499", "#DDAA33", "#117733", "#332288", "#CC6677", "#88CCEE", "#661100")
EXTRA_MARKERS = ("h", "8", "H", "<", ">")
ACRONYMS = {"cppo", "drpo", "dppo", "gmpo", "grpo", "gspo", "kl", "pg", "ppo", "sapo", "spo", "trm", "tv"}


class Results:
    """A folder of tables (`results/<suite>` or `runs/<suite>`), read once. Each table is checked for what is asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, pd.DataFrame] = {}

    @cached_property
    def suite(self) -> dict[str, Any]:
        """The contents of suite.json."""
        suite = self._json("suite.json")
        for key in ("seeds", "settings", "evaluation", "rules"):
            if key not in suite:
                raise DataError(f"{self.folder}/suite.json: missing key {key!r}")
        return suite

    @cached_property
    def configs(self) -> dict[str, Any]:
        """The contents of configs.json: run id -> resolved configuration."""
        return self._json("configs.json")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; expected a folder of a suite's tables") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: not a JSON object: {error}") from None

    @property
    def rules(self) -> list[str]:
        """Names of the suite's rules in row order, without base."""
        return [entry["name"] for entry in self.suite["rules"]]

    @property
    def ranked(self) -> bool:
        """Whether there are seeds enough to rank rules and bootstrap intervals."""
        return len(self.suite["seeds"]) >= RANK_FROM

    def entry(self, rule: str) -> dict[str, Any]:
        """What the suite says of that rule."""
        return dict(next(entry for entry in self.suite["rules"] if entry["name"] == rule))

    def params_of(self, rule: str, setting: str) -> dict[str, Any]:
        """The parameters that the rule's runs had in one setting, from their resolved configurations in configs.json."""
        for config in self.configs.values():
            if config["setting_name"] == setting and config.get("rule", {}).get("name") == rule:
                return dict(config["rule"]["params"])
        raise DataError(f"{self.folder}/configs.json: no run of {rule} in {setting!r}")

    def require(self, item: str) -> None:
        """DataError when the suite lacks what the item shows."""
        lack = catalog.lacks(self.suite, item)
        if lack is not None:
            raise DataError(f"{self.folder}/suite.json: {item} cannot be drawn: {lack}")

    def table(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        """These columns of <name>.csv.

        Raises DataError when the file, a column or every row is missing, or for text where a number is expected.
        """
        path = self.folder / f"{name}.csv"
        try:
            if name not in self._tables:
                self._tables[name] = parse_csv(path)
            table = self._tables[name]
            check_columns(table, columns, path)
        except ValueError as error:
            raise DataError(str(error)) from None
        if table.empty:
            raise DataError(f"{path}: no rows")
        return table[list(columns)]

    def look(self, rule: str) -> Look:
        """Fixed for known rules; others get the next free colour in the order of the suite's rows."""
        if rule in LOOKS:
            return LOOKS[rule]
        unknown = [name for name in self.rules if name not in LOOKS]
        n = unknown.index(rule)
        words = rule.replace("-", "_").split("_")
        name = " ".join(word.upper() if word in ACRONYMS else word for word in words)
        return Look(name, EXTRA[n % len(EXTRA)], EXTRA_MARKERS[n % len(EXTRA_MARKERS)])

    def name(self, rule: str) -> str:
        """The rule's display name."""
        return self.look(rule).name

    def title(self, setting: str) -> str:
        """The setting's display name."""
        return str(self.suite["settings"][setting]["title"])


def script(doc: str | None, draw: Callable[[Results, Path], None]) -> Callable[[Sequence[str] | None], int]:
    """The `main(argv)` of a script: reads the command line, draws, returns the exit code (2 = something is missing)."""

    def main(argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("results", type=Path, help="folder with a suite's tables, such as results/mini")
        parser.add_argument("--out", type=Path, help="folder to write to (default: figures/ inside it)")
        arguments = parser.parse_args(argv)
        out: Path = arguments.out or arguments.results / "figures"
        try:
            draw(Results(arguments.results), out)
        except DataError as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            plt.close("all")
        return 0

    return main


def canvas(width: float = 7.0, height: float = 2.6) -> Figure:
    """An empty figure (inches) in the common style."""
    plt.style.use(Path(__file__).with_name("paper.mplstyle"))
    return plt.figure(figsize=(width, height))


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend below all panels, in as few rows as fit the page, its columns evenly filled."""
    for rows in range(1, len(handles) + 1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows))
        if rows == len(handles) or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            return
        legend.remove()


def save(figure: Figure, out: Path, name: str) -> None:
    """<name>.pdf and <name>.png, the same bytes for the same data: no dates inside."""
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    figure.savefig(out / f"{name}.png", metadata={"Software": None})
    print(f"wrote {out / name}.pdf and .png")
