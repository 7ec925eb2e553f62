"""Tables and figures from synthetic results folders: numbers against slow loops, same bytes again, one-line errors."""

import csv
import doctest
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from cppo.objectives import params_of, spec

SCRIPTS = Path(__file__).parents[1] / "paper_figures"
sys.path.insert(0, str(SCRIPTS))  # as for a script run alone
catalog = importlib.import_module("catalog")

TV = {"estimator": "top_k", "kind": "tv", "k": 4, "support": None}
MAIN: dict[str, dict[str, Any]] = {
    "pg": {},
    "ppo": {"advantage": "gae"},
    "grpo": {},
    "cispo": {},
    "dppo": {"params": {"delta": 0.15}, "divergence": TV},
    "cppo": {"params": {"delta_b": 0.02}, "divergence": TV, "params_by_setting": {"moe": {"delta": 0.2}}},
    "mine": {"objective": "my_module:mine", "params": {"limit": 0.1}},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "cppo_no_weight": {"w_min": 1.0},
    "cppo_no_budget": {"delta_b": None},
    "cppo_shuffled": {"delta_b": None, "shuffle": True},
    "cppo_soft": {"soft": True},
    "cppo_budget_fixed": {"delta_b": 0.03, "adaptive": False},
    "cppo_wmin": {"w_min": 0.6},
    "cppo_kl": {"delta": 0.1, "delta_b": 0.002},
    "cppo_binary": {},
    "cppo_padded": {"span": "max_response_tokens"},
}
TITLES = {"base": "Qwen3-100k-Base", "moe": "Qwen3-MoE-225k-Base", "larger": "Qwen3-300k-Base"}
COLLAPSED = {("cispo", "moe", 0): 17, ("cispo", "moe", 1): 31, ("pg", "base", 1): 23}
"""(rule, setting, seed) -> iteration of collapse."""
STOP, EVERY, SAMPLES, PROBLEMS = 50, 10, 16, {"chain_6": 20, "chain_10": 14, "chain_14": 9}


def entries(ablations: bool) -> list[dict[str, Any]]:
    """Objective entries as in suite.json."""
    chosen = dict(MAIN)
    if ablations:
        chosen = {name: MAIN[name] for name in ("dppo", "cppo")}
        chosen |= {name: {"objective": "cppo", "params": params} for name, params in ABLATIONS.items()}
        chosen["trm_kl"] = {"objective": "trm", "params": {"delta_max": 0.1, "delta_mean": 0.002}}
        for name, entry in chosen.items():
            binary = {"estimator": "binary", "kind": "tv", "k": None}
            entry["divergence"] = binary if "binary" in name else {**TV, "kind": "kl" if name.endswith("kl") else "tv"}
    return [published(name, **given) for name, given in chosen.items()]


def published(name: str, **given: Any) -> dict[str, Any]:
    """One rule as in suite.json."""
    blank: dict[str, Any] = {"params": {}, "params_by_setting": {}, "divergence": None, "advantage": "grpo"}
    rule = {"name": name, "objective": name, **blank, "aggregation": "token-mean", **given}
    known = ":" not in rule["objective"]
    return {"traces": list(spec(rule["objective"]).traces) if known else [], **rule}


def resolved(rule: dict[str, Any], setting: str, longest: int) -> dict[str, Any]:
    """A rule's parameters as in configs.json: all of them."""
    params = {**rule["params"], **rule["params_by_setting"].get(setting, {})}
    params = {key: longest if value == "max_response_tokens" else value for key, value in params.items()}
    return asdict(params_of(rule["objective"], **params)) if ":" not in rule["objective"] else params


def make(
    folder: Path,
    seeds: int,
    settings: Sequence[str] = ("base", "moe"),
    ablations: bool = False,
    rules: list[dict[str, Any]] | None = None,
) -> Path:
    """Writes the tables of a suite that learned, with two kinds of failure: a fall of the score, and a collapse."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    benchmarks = [{"name": name, "size": 6, "problems": count} for name, count in PROBLEMS.items()]
    rollout = {"prompts": 32, "responses": 8, "minibatch": 4, "max_response_tokens": 128}
    plan = {"task": {"benchmarks": benchmarks}, "rollout": rollout, "iterations": STOP, "checkpoint_every": EVERY}
    suite: dict[str, Any] = {
        "seeds": list(range(seeds)),
        "settings": {name: {"title": TITLES[name], **plan} for name in settings},
        "evaluation": {"samples": SAMPLES},
        "rules": rules or entries(ablations),
    }
    (folder / "suite.json").write_text(json.dumps(suite))
    configs: dict[str, Any] = {}
    tables: dict[str, list[dict[str, Any]]] = {n: [] for n in ("runs", "scores", "curves", "positions", "tokens")}
    for setting in settings:
        ease = {name: rng.normal(0.4 - n, 0.8, count) for n, (name, count) in enumerate(PROBLEMS.items())}
        configs[f"b-{setting}"] = {"setting_name": setting}
        base = {"run": f"b-{setting}", "rule": "base", "setting": setting, "seed": 0}
        tables["scores"] += scored(base, 0, -1.0, ease, rng)
        for number, rule in enumerate(suite["rules"]):
            for seed in range(seeds):
                key = {"run": f"{setting[0]}{number}-{seed}", "rule": rule["name"], "setting": setting, "seed": seed}
                params = resolved(rule, setting, rollout["max_response_tokens"])
                configs[key["run"]] = {"rule": {**rule, "params": params}, "setting_name": setting, "seed": seed}
                lost = COLLAPSED.get((rule["name"], setting, seed))
                status = {"status": "finished" if lost is None else "collapsed", "collapsed_at": lost}
                tables["runs"].append({**key, **status, "iterations": lost or STOP, "numerics": "1"})
                one_run(tables, key, lost, ease, number, "threshold" in rule["traces"], rng)
    (folder / "configs.json").write_text(json.dumps(configs))
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["run", "rule"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def scored(
    key: dict[str, Any], iteration: int, skill: float, ease: dict[str, Any], rng: np.random.Generator
) -> list[Any]:
    """One checkpoint's rows of scores.csv; about one answer in fifty problems could not be judged."""
    rows = []
    for name, level in ease.items():
        for problem, rate in enumerate(1 / (1 + np.exp(-level - skill))):
            lost = int(rng.random() < 0.02)
            correct = int(rng.binomial(SAMPLES - lost, rate))
            row = {
                "iteration": iteration,
                "benchmark": name,
                "problem": f"p{problem}",
                "correct": correct,
                "samples": SAMPLES,
            }
            rows.append({**key, **row, "unjudged": lost, "mean_length": 60.5, "truncated": 0})
    return rows


def one_run(
    tables: Any, key: dict[str, Any], lost: int | None, ease: Any, number: int, shows: bool, rng: np.random.Generator
) -> None:
    """Rows of one run in all tables; shows: whether its rule has thresholds to show."""
    unmasked = key["rule"] in ("pg", "cispo")
    start, peak = 12 + 2 * (number % 4) + rng.normal(0, 1), 5.5 - 0.3 * (number % 3)
    for i in range(1, (lost or STOP) + 1):
        skill = -1 + peak / (1 + np.exp(-(i - start) / 5)) - (max(0, i - 25) * 0.2 if unmasked else 0)
        reward, share = 1 / (1 + np.exp(-skill + 0.6)) + rng.normal(0, 0.02), 0.002 + 0.01 * rng.random()
        row = {
            "reward": reward, "accuracy": reward, "response_length": 62 + 4 * rng.normal() + (i if unmasked else 0),
            "entropy": 0.3, "divergence": "" if unmasked else 0.01, "mask_share": share,
            "mask_share_budget": 0.2 * share * rng.random() if shows else 0, "mask_share_threshold": 0.8 * share,
            "delta_b": 0.02 + 0.015 * rng.random() * (1 - i / 70) if shows else "", "grad_norm": 1, "drift": 0.02,
            "relative_logprob_error": float(np.exp(rng.normal(-12 + number / 4, 0.2))),
        }  # fmt: skip
        tables["curves"].append({**key, "iteration": i, **row})
        if i % EVERY == 0:
            tables["scores"] += scored(key, i, skill, ease, rng)
            for first in range(1, 100, 8):
                drift = (0.004 + 0.0004 * first) * (3 if unmasked else 1) * (1 + 0.1 * number) * rng.uniform(0.9, 1.1)
                bins = {"iteration": i, "first": first, "last": first + 7, "count": 2000 - 15 * first, "drift": drift}
                tables["positions"].append({**key, **bins, "tail": 6 * drift})
            for response in range(3 if shows else 0):
                tables["tokens"] += tokens({**key, "iteration": i, "row": response}, rng)


def tokens(key: dict[str, Any], rng: np.random.Generator) -> list[Any]:
    """One response's rows of tokens.csv under CPPO's rule, in plain loops."""
    delta, delta_b, used, allowed, rows = 0.15, 0.02, 0.0, 0.0, []
    words = [*"a3-8=5b5*9=5c5+5=0d0-7=3e3*3=9f9+9=8g8-2=6h6*7=2", "\\boxed{", "2", "}", "NA", " $", "\n"]
    for t, word in enumerate(words, start=1):
        weight = 1 - 0.2 * (t - 1) / (len(words) - 1)
        weighted = weight * float(rng.exponential(0.08 if words[max(t - 2, 0)] == "=" else 0.005))
        adjusted = delta + delta_b * allowed - used
        keep = rng.random() < 0.4 or weighted <= min(delta, adjusted)
        row = {"position": t, "token": word, "advantage": 1.0, "ratio": 1.1, "weighted": weighted}
        causes = {"threshold": min(delta, adjusted), "reason": 0 if keep else 2 if weighted <= delta else 1}
        rows.append({**key, **row, "prefix_threshold": adjusted, **causes})
        used, allowed = used + weighted, allowed + weight
    return rows


# What follows are the tests.


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 settings x 7 rules x 2 seeds."""
    return make(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One setting with 6 seeds."""
    return make(tmp_path_factory.mktemp("six"), 6, ("base",))


def draw(item: str, folder: Path, out: Path | None = None) -> int:
    code: int = importlib.import_module(item).main([str(folder), *(["--out", str(out)] if out else [])])
    return code


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def avg(folder: Path, rule: str, setting: str, seed: int) -> dict[int, dict[str, float]]:
    """Slow scores: iteration -> benchmark -> Avg@k in percent, with their mean as "avg", from iteration 0 on."""
    parts: dict[int, dict[str, list[float]]] = {}
    for row in rows(folder / "scores.csv"):
        own = row["rule"] == rule and int(row["seed"]) == seed
        if row["setting"] == setting and (own or row["rule"] == "base"):
            rate = 100 * int(row["correct"]) / (int(row["samples"]) - int(row["unjudged"]))
            parts.setdefault(int(row["iteration"]), {}).setdefault(row["benchmark"], []).append(rate)
    means = {
        iteration: {name: mean(part) for name, part in benchmark.items()} for iteration, benchmark in parts.items()
    }
    return {iteration: {**benchmark, "avg": mean(benchmark.values())} for iteration, benchmark in means.items()}


@pytest.mark.parametrize(("name", "ablations"), [("main", False), ("ablations", True)])
def test_every_available_item_is_drawn(name: str, ablations: bool, two: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / name, 2, ("base",), True) if ablations else two
    suite = json.loads((folder / "suite.json").read_text())
    items = catalog.available(suite)
    assert [n for n in range(1, 9) if f"figure{n}" not in items] == ([] if ablations else [5, 6])
    for item in items:
        if ablations and item in ("figure1", "figure2", "figure3", "figure8"):
            continue  # drawn from the main suite
        out = tmp_path / item
        assert draw(item, folder, out) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(catalog.files(suite, item))
        assert all(path.stat().st_size > 100 for path in out.iterdir())


def test_tables_1_and_4_against_slow_loops(two: Path, tmp_path: Path) -> None:
    assert draw("table1", two, tmp_path) == draw("table4", two, tmp_path) == 0
    table1, table4 = rows(tmp_path / "table1.csv"), rows(tmp_path / "table4.csv")
    assert [row["rule"] for row in table1[:8]] == ["base", *MAIN]
    for first, fourth in zip(table1, table4, strict=True):
        assert (first["rule"], first["setting"]) == (fourth["rule"], fourth["setting"])
        seeds = [0] if first["rule"] == "base" else [0, 1]
        scores = [avg(two, first["rule"], first["setting"], seed) for seed in seeds]
        best = [max(score.values(), key=lambda at: at["avg"]) for score in scores]
        final = [score[max(score)]["avg"] for score in scores]
        for row, column, values in (
            *((fourth, name, [at[name] for at in best]) for name in (*PROBLEMS, "avg")),
            (first, "best", [at["avg"] for at in best]),
            (first, "final", final),
        ):
            found = [float(row[column + end]) for end in ("", "_low", "_high")]
            np.testing.assert_allclose(found, [mean(values), min(values), max(values)], rtol=2e-5)
    text = (tmp_path / "table1.md").read_text() + (tmp_path / "table1.tex").read_text()
    assert not any(mark in text for mark in ("**", "<u>", "textbf", "underline", "P(>"))
    for expected in ("(1/2 collapsed)", "collapse@17, 31", "[min, max]", "Seeds: 2 (0, 1)", "16 samples", "is shared"):
        assert expected in text
    unjudged = sum(int(row["unjudged"]) for row in rows(two / "scores.csv"))
    assert f"{unjudged} answers could be judged neither right nor wrong" in text


def test_from_5_seeds_on_intervals_ranks_and_improvement(six: Path, tmp_path: Path) -> None:
    assert draw("table1", six, tmp_path) == draw("table4", six, tmp_path) == 0
    table = [row for row in rows(tmp_path / "table1.csv") if row["setting"] == "base"]
    finals = {}
    for row in table[1:]:
        scores = [avg(six, row["rule"], "base", seed) for seed in range(6)]
        finals[row["rule"]] = [score[50]["avg"] if 50 in score else -1 for score in scores]
        bests = [max(at["avg"] for at in score.values()) for score in scores]
        assert float(row["best"]) == pytest.approx(mean(bests), rel=2e-5)
        assert float(row["best_low"]) < float(row["best"]) < float(row["best_high"])
    for row in table[1:]:
        if row["rule"] == "dppo":
            assert row["final_improvement"] == ""
            continue
        pairs = [(x > y) + (x == y) / 2 for x in finals[row["rule"]] for y in finals["dppo"]]
        assert float(row["final_improvement"]) == pytest.approx(mean(pairs), abs=1e-5)
        assert float(row["final_improvement_low"]) <= mean(pairs) <= float(row["final_improvement_high"])
    lines = (tmp_path / "table1.md").read_text().splitlines()
    cells = {row["rule"]: line.split(" | ") for row, line in zip(table, lines[2:], strict=False)}
    order = sorted((row for row in table[1:] if row["collapsed"] == "0"), key=lambda row: -float(row["best"]))
    assert cells[order[0]["rule"]][1].startswith("**") and cells[order[1]["rule"]][1].startswith("<u>")
    assert sum("**" in line for line in lines) and "(1/6 collapsed)" in cells["pg"][1]
    assert sum(cell.startswith("**") for row in cells.values() for cell in row[1:3]) == 2
    tex = (tmp_path / "table1.tex").read_text()
    assert r"\textbf{" in tex and r"\underline{" in tex and r"\multicolumn{3}{c}{Qwen3-100k-Base}" in tex
    average = {row["rule"]: row["avg"] for row in rows(tmp_path / "table4.csv") if row["setting"] == "base"}
    assert average == {row["rule"]: row["best"] for row in table}  # the same numbers in both tables
    assert draw("figure4", six, tmp_path) == 0


def test_tables_2_and_3_come_from_the_suite(two: Path, tmp_path: Path) -> None:
    assert draw("table2", two, tmp_path) == draw("table3", two, tmp_path) == 0
    facts = {row["rule"]: row for row in rows(tmp_path / "table2.csv")}
    assert facts["cppo"]["params"] == "delta 0.15/0.2, w_min 0.8, delta_b 0.02, adaptive"
    assert facts["dppo"]["statistic"] == "Top-4 TV from μ" and facts["grpo"]["params"].endswith("clip_high 0.28")
    assert facts["mine"]["objective"] == "my_module:mine"
    first, second = rows(tmp_path / "table3.csv")
    assert (first["updates_per_rollout"], first["delta"], second["delta"], first["t_stop"]) == (
        "8",
        "0.15",
        "0.2",
        "50",
    )


def test_printed_parameters_are_the_runs_not_todays_defaults(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another default in the code, a table of older runs says what they were trained with."""
    monkeypatch.setattr(spec("grpo").params.__init__, "__defaults__", (0.2, 0.99, None))
    assert params_of("grpo").clip_high == 0.99
    assert draw("table2", two, tmp_path) == draw("table3", two, tmp_path) == 0
    facts = {row["rule"]: row for row in rows(tmp_path / "table2.csv")}
    assert facts["grpo"]["params"] == "clip_low 0.2, clip_high 0.28"


def test_a_rule_of_ones_own_shows_its_thresholds_and_budget(tmp_path: Path) -> None:
    """Figures 2, 3 and 7 go by traces and parameters, not by the name cppo; a panel each where there are two."""
    shown = ["weighted", "threshold", "prefix_threshold", "delta_b"]
    mine = published("mine", objective="my_module:mine", params={"limit": 0.1}, traces=shown, divergence=TV)
    unbudgeted = published("bare", objective="my_module:mine", params={"delta_b": None}, traces=shown)
    folder = make(
        tmp_path, 2, ("base",), rules=[published("grpo"), unbudgeted, mine, published("cppo", **MAIN["cppo"])]
    )
    suite = json.loads((folder / "suite.json").read_text())
    assert {"figure3", "figure7"} <= set(catalog.available(suite))
    results = importlib.import_module("common").Results(folder)
    assert importlib.import_module("figure3").shown(results) == ["bare", "cppo"]
    assert importlib.import_module("figure7").shown(results) == ["mine", "cppo"]
    for item in ("table2", "figure2", "figure3", "figure7"):
        assert draw(item, folder) == 0
    facts = {row["rule"]: row for row in rows(folder / "figures" / "table2.csv")}
    assert facts["mine"]["params"] == "limit 0.1" and facts["mine"]["objective"] == "my_module:mine"
    only = make(tmp_path / "only", 2, ("base",), rules=[mine])
    assert draw("figure3", only) == draw("figure7", only) == 0


def test_a_divergence_of_ones_own_is_named(two: Path) -> None:
    said = importlib.import_module("table2").divergence({"estimator": "my_module:hellinger", "kind": "tv", "k": None})
    assert said == "hellinger TV from μ"


def test_figures_2_and_3_select_by_their_rules(two: Path) -> None:
    results = importlib.import_module("common").Results(two)
    window = importlib.import_module("figure2").last_window(results, "moe", "cispo")
    last = [r for r in rows(two / "positions.csv") if r["rule"] == "cispo" and r["setting"] == "moe"]
    last = [r for r in last if (r["seed"], r["iteration"]) in (("0", "10"), ("1", "30")) and r["first"] == "9"]
    weight = [float(r["count"]) for r in last]
    expected = sum(w * float(r["drift"]) for w, r in zip(weight, last, strict=True)) / sum(weight)
    assert float(window[window["first"] == 9]["drift"].iloc[0]) == pytest.approx(expected)

    shown = importlib.import_module("figure3").window(results, "cppo")
    responses: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows(two / "tokens.csv"):
        responses.setdefault((row["run"], row["iteration"], row["row"]), []).append(row)

    def rejected(part: list[dict[str, str]]) -> tuple[int, int]:
        return sum(r["reason"] == "2" for r in part), sum(r["reason"] != "0" for r in part)

    chosen = max(responses.values(), key=rejected)
    windows = [chosen[start : start + 40] for start in range(len(chosen) - 39)]
    assert list(shown["position"]) == [float(r["position"]) for r in max(windows, key=rejected)]
    assert list(shown["token"]) == [r["token"] for r in max(windows, key=rejected)]


def test_figure_7_share_and_training_curves(two: Path) -> None:
    panels, common = importlib.import_module("panels"), importlib.import_module("common")
    x, values, lost = panels.training(common.Results(two), "base", "pg", "reward")
    assert values.shape == (2, 50) and list(x[:2]) == [1, 2] and lost == [False, True]
    assert np.isfinite(values).sum(axis=1).tolist() == [50, 23]
    low, high = panels.spread(common.Results(two), values, "any")
    np.testing.assert_allclose((low[:23] + high[:23]) / 2, values[:, :23].mean(axis=0))
    share = importlib.import_module("figure7").budget_share(common.Results(two), "moe", "cppo")
    own = [r for r in rows(two / "curves.csv") if (r["rule"], r["setting"], r["seed"]) == ("cppo", "moe", "1")]
    expected = [100 * float(r["mask_share_budget"]) / float(r["mask_share"]) for r in own]
    np.testing.assert_allclose(share[1], expected, rtol=1e-12)


@pytest.mark.parametrize("item", ["figure3", "figure4", "table1"])
def test_same_bytes_again(item: str, two: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert draw(item, two, tmp_path / out) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.suffix != ".pdf" or b"CreationDate" not in path.read_bytes()


def test_a_script_runs_alone_from_anywhere_and_the_catalog_is_light(two: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "table3.py"), str(two), "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "table3.tex").exists()
    code = "import sys, catalog; sys.exit(bool({'matplotlib', 'pandas', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS).returncode == 0
    with pytest.raises(ValueError, match="unknown item 'figure9'"):
        catalog.lacks({}, "figure9")


def test_looks_are_fixed_and_distinct(two: Path) -> None:
    common = importlib.import_module("common")
    known = ["base", "pg", "ppo", "grpo", "cispo", "minpro", "trm_max", "trm_avg", "dppo", "cppo"]
    looks = [common.LOOKS[rule] for rule in known]
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == len(known)
    pairs = [(look.color, look.marker) for look in common.LOOKS.values()]
    assert len(set(pairs)) == len(pairs)
    results = common.Results(two)
    assert results.look("cppo") is common.LOOKS["cppo"] and results.name("mine") == "mine"
    assert results.look("mine").color == common.EXTRA[0]
    results.suite["rules"].append({"name": "dppo-kl", "objective": "dppo"})
    assert results.look("dppo-kl") == common.Look("DPPO KL", common.EXTRA[1], common.EXTRA_MARKERS[1])
    for name in ("typeset", "figure3"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_report_is_one_page_with_every_item(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = importlib.import_module("report")
    suite = json.loads((copy / "suite.json").read_text()) | {"description": "Why, & what for."}
    (copy / "suite.json").write_text(json.dumps(suite))
    arguments = [str(copy), "--out", str(copy / "runs" / "report.html")]
    assert report.main(arguments) == 2
    assert capsys.readouterr().err == f"{copy}/figures/table1.md: No such file or directory; draw the figures first\n"
    items = catalog.available(suite)
    names = [name for item in items for name in catalog.files(suite, item)]
    (copy / "figures").mkdir()
    for name in names:
        (copy / "figures" / name).write_text(f"| {name} |\n")
    assert report.main(arguments) == 0
    html = (copy / "runs" / "report.html").read_text()
    assert html.count("<h2>") == len(items) and "<h2>Figure 4: validation curves" in html
    assert html.count("<img") == sum(name.endswith(".png") for name in names) and html.count("table1.md") == 1
    assert "Why, &amp; what for." in html and "numerics version 1." in html


def test_a_table_as_html() -> None:
    table = importlib.import_module("report").table
    assert table("| a | b |\n| --- | --- |\n| **1** [0, 2] | <u>x \\| y</u> |\n\nWhat & why.\n") == (
        "<table><tr><td>a</td><td>b</td></tr><tr><td><b>1</b> [0, 2]</td><td><u>x | y</u></td></tr></table>"
        "<p>What &amp; why.</p>"
    )


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder to damage."""
    for path in two.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    yield tmp_path


@pytest.mark.parametrize(
    ("item", "file", "old", "new", "message"),
    [
        ("figure4", "suite.json", None, None, "suite.json: No such file"),
        ("table3", "suite.json", "", "{", "suite.json: not a JSON object"),
        ("table3", "suite.json", '"seeds"', '"seed"', "suite.json: missing key 'seeds'"),
        ("figure4", "scores.csv", None, None, "scores.csv: missing"),
        ("figure2", "positions.csv", "tail", "tale", "positions.csv: column tail is missing"),
        ("figure7", "curves.csv", "delta_b", "delta", "curves.csv: column delta_b is missing"),
        ("figure3", "tokens.csv", "weighted", "w", "tokens.csv: column weighted is missing"),
        ("table1", "scores.csv", "chain_6,p3,", "chain_6,p3,x", "correct: 'x"),
        ("table1", "scores.csv", ",16,0,", ",1,0,", "correct <= samples - unjudged is violated"),
        ("table1", "scores.csv", "pg,base,0,20,chain_6,p3,", "pg,base,0,20,chain_6,p4,", "42 of 43 problems, 1 more"),
        ("table1", "scores.csv", "pg,base,0,20,", "pg,base,9,20,", "run b0-0: seed 9"),
        ("table4", "scores.csv", "dppo,moe,1,50,", "dppo,moe,1,40,", "problems, 43 more than once"),
        (
            "table1",
            "scores.csv",
            "base,moe,0,0,",
            "none,moe,0,0,",
            "no row of rule 'base' at iteration 0 in setting 'moe'",
        ),
        (
            "table1",
            "runs.csv",
            "pg,base,0,finished",
            "pg,base,0,running",
            "'running' is neither finished nor collapsed",
        ),
        ("table1", "runs.csv", "pg,base,0,", "pg,base,7,", "0 runs of pg in 'base' with seed 0, expected 1"),
        ("figure8", "curves.csv", "pg,base,0,50,", "pg,base,0,49,", "an iteration is given twice"),
        ("figure8", "curves.csv", "pg,base,0,50,", "no,base,0,50,", "finished, but its last iteration is 49 of 50"),
        (
            "figure3",
            "suite.json",
            '"weighted"',
            '"other"',
            "no rule of the suite shows weighted, threshold",
        ),
        ("figure3", "tokens.csv", ",cppo,", ",pg,", "tokens.csv: no row of a rule that shows weighted"),
        ("figure7", "suite.json", '"delta_b": 0.02', '"delta_b": null', "no rule of the suite shows delta_b"),
        ("table2", "configs.json", None, None, "configs.json: No such file"),
        ("table2", "configs.json", '"name": "dppo"', '"name": "d"', "configs.json: no run of dppo in 'base'"),
        (
            "table1",
            "runs.csv",
            "pg,base,0,finished,",
            "pg,base,0,collapsed,",
            "'collapsed' is neither finished nor collapsed at an iteration",
        ),
        ("figure5", "runs.csv", "", "", "figure5 cannot be drawn: no panel has all its rules"),
        ("figure6", "runs.csv", "", "", "the suite has none named cppo_binary, cppo_budget_fixed"),
    ],
)
def test_what_is_missing_is_one_line_and_code_2(
    item: str, file: str, old: str | None, new: str | None, message: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / file
    if old is None:
        path.unlink()
    else:
        assert old in path.read_text()
        path.write_text(new + path.read_text() if old == "" and new else path.read_text().replace(old, str(new)))
    assert draw(item, copy) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (copy / "figures").exists()
