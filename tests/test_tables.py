"""Collecting, checking and publishing tables, on run folders made by hand."""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from cppo.__main__ import main
from cppo.numerics import NUMERICS_VERSION
from cppo.results.columns import TABLES, read_table
from cppo.results.provenance import PACKAGES
from cppo.results.run_folder import RunFolder, Status
from cppo.results.tables import SUMS, as_csv, check, collect, publish, published_suite
from cppo.suite.config import BaseConfig, RunConfig
from cppo.suite.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parent.parent
KEY = ["run", "rule", "setting", "seed"]
COLUMNS = {
    "scores": "run rule setting seed iteration benchmark problem correct samples unjudged mean_length truncated".split(),
    "curves": (
        "run rule setting seed iteration reward accuracy unjudged response_length truncated entropy divergence mask_share"
        " mask_share_threshold mask_share_budget mask_share_sequence gate_mean delta_b loss value_loss grad_norm"
        " relative_logprob_error drift zero_variance skipped_updates nonfinite_updates"
    ).split(),
    "positions": "run rule setting seed iteration first last count drift tail".split(),
    "tokens": (
        "run rule setting seed iteration row position token advantage ratio reason weighted prefix_threshold threshold"
    ).split(),
    "runs": [
        *"run rule setting seed objective status iterations collapsed_at seconds".split(),
        *"rollout_tokens_per_second update_tokens_per_second numerics commit python machine".split(),
        *PACKAGES,
    ],
}
"""What the figures and readers count on."""


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(config: RunConfig | BaseConfig, folder: Path) -> None:
    """What training (or the warm start) and evaluation leave in a run's folder, as far as tables need it."""
    folder.mkdir(parents=True)
    trained = isinstance(config, RunConfig)
    setting, every = config.setting, config.setting.checkpoint_every
    RunFolder(folder).finish(Status(setting.iterations if trained else 100))
    provenance = {"numerics": str(NUMERICS_VERSION), "commit": "abc", "python": "3.11.7", "machine": "Linux x86_64"}
    (folder / "provenance.json").write_text(json.dumps(provenance | dict.fromkeys(PACKAGES, "1.0")))
    key = {"run": config.id, "rule": "base", "setting": config.setting_name, "seed": 0}
    if isinstance(config, RunConfig):
        key |= {"rule": config.rule_name, "seed": config.seed}
    # Problem ids are hex digits; these happen to be decimal ones, which must stay text all the same.
    score = {"correct": 1, "samples": config.evaluation.samples, "unjudged": 1, "mean_length": 9.5, "truncated": 0}
    scores = [
        {**key, "iteration": iteration, "benchmark": benchmark.name, "problem": f"{number}{position:011}", **score}
        for iteration in (range(every, setting.iterations + 1, every) if trained else [0])
        for number, benchmark in enumerate(setting.task.benchmarks)
        for position in range(benchmark.problems)
    ]
    pd.DataFrame(scores).to_csv(folder / "scores.csv", index=False)
    if not trained:
        return
    iterations = range(1, setting.iterations + 1)
    lines(folder / "metrics.jsonl", [{"iteration": i, "reward": i / 10, "mask_share/budget": 0.25} for i in iterations])
    lines(
        folder / "timings.jsonl", [{"total": 1.5, "tokens": 30 * i, "rollout": 0.5, "update": 1.0} for i in iterations]
    )
    sums = {"count": 4, "sum": 1.0, "tail_count": 2, "tail_sum": 1.0}
    lines(
        folder / "positions.jsonl",
        [{"iteration": i, "first": 1, "last": 2, **sums, "sum": float(i)} for i in iterations],
    )
    names = ["advantage", "ratio", "reason", "weighted", "prefix_threshold", "threshold"]
    dump = {"row": 3, "token": ["a", "7"], **{name: [0, 1] for name in names}}
    lines(folder / "tokens.jsonl", [{"iteration": i, **dump} for i in (every, 2 * every)])


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """config/smoke.yaml cut down to one rule and one seed."""
    raw = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text().replace("1e-", "1.0e-"))
    raw |= {"seeds": [1], "rules": [entry for entry in raw["rules"] if entry["name"] == "cppo"]}
    path = tmp_path / "config" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(raw))
    return load_suite(path)


@pytest.fixture
def root(tmp_path: Path, suite: Suite) -> Path:
    """A folder as `runs/` with every run of the suite trained and scored."""
    for config in (*suite.bases(), *suite.runs()):
        write_run(config, tmp_path / "runs" / config.folder)
    return tmp_path / "runs"


@pytest.fixture
def tables(suite: Suite, root: Path) -> Path:
    """The collected tables."""
    collect(suite, root, root / "tiny")
    return root / "tiny"


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv", dtype={"run": str, "problem": str, "numerics": str})


def refusal(action: Callable[[], object], path: Path) -> str:
    """The one-line ValueError that starts with the path; returns what follows."""
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.startswith(f"{path}: "), message
    return message.removeprefix(f"{path}: ")


# Collecting -----------------------------------------------------------------------------------------------------------


def test_collected_tables_have_the_documented_columns(tables: Path) -> None:
    """CSV and parquet alike, and nothing else is written than the tables and the two configurations."""
    assert set(COLUMNS) == set(TABLES)
    for name, columns in COLUMNS.items():
        assert list(read(tables, name).columns) == list(pd.read_parquet(tables / f"{name}.parquet").columns) == columns
    files = {f"{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")}
    assert {path.name for path in tables.iterdir()} == files | {"suite.json", "configs.json"}


def test_collected_numbers(suite: Suite, tables: Path) -> None:
    """Each table's values, by hand."""
    base, run = suite.bases()[0], suite.runs()[0]
    problems = sum(benchmark.problems for benchmark in run.setting.task.benchmarks)
    found = {name: read(tables, name) for name in TABLES}
    for name in ("curves", "positions", "tokens"):
        assert found[name][KEY].drop_duplicates().values.tolist() == [[run.id, "cppo", "tiny", 1]]
    assert found["scores"].groupby(["run", "iteration"]).size().to_dict() == {
        (base.id, 0): problems,
        (run.id, 2): problems,
        (run.id, 4): problems,
    }
    assert found["curves"]["iteration"].tolist() == [1, 2, 3, 4]
    assert found["curves"]["reward"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert found["curves"]["mask_share_budget"].tolist() == [0.25] * 4 and found["curves"]["entropy"].isna().all()
    # Iterations 1 and 2 lead to checkpoint 2, iterations 3 and 4 to checkpoint 4.
    assert found["positions"]["iteration"].tolist() == [2, 4] and found["positions"]["count"].tolist() == [8, 8]
    assert found["positions"]["drift"].tolist() == [3 / 8, 7 / 8] and found["positions"]["tail"].tolist() == [0.5, 0.5]
    assert found["tokens"][["iteration", "row", "position"]].values.tolist() == [
        [2, 3, 1],
        [2, 3, 2],
        [4, 3, 1],
        [4, 3, 2],
    ]
    runs = found["runs"].set_index("rule")
    assert runs.loc["base", ["run", "objective", "iterations"]].tolist() == [base.id, "warm start", 100]
    assert runs.loc["cppo", ["run", "status", "iterations", "seconds"]].tolist() == [run.id, "finished", 4, 6.0]
    assert runs.loc["cppo", "rollout_tokens_per_second"] == 150 and runs.loc["cppo", "update_tokens_per_second"] == 75


def test_collected_configurations(suite: Suite, tables: Path) -> None:
    configs = json.loads((tables / "configs.json").read_text())
    assert configs.keys() == {suite.bases()[0].id, suite.runs()[0].id}
    assert json.loads((tables / "suite.json").read_text()) == suite.published()
    assert published_suite(tables) == suite


def test_ids_stay_text(suite: Suite, root: Path) -> None:
    """One id in sixty consists of digits, or of digits and one e: read as a number, it would be another one."""
    folder = root / suite.runs()[0].folder
    scores = read(folder, "scores").assign(run="0012345678", problem="12345e6789")
    scores.to_csv(folder / "scores.csv", index=False)
    collect(suite, root, root / "tiny")
    for table in (read(root / "tiny", "scores"), pd.read_parquet(root / "tiny" / "scores.parquet")):
        trained = table[table["rule"] == "cppo"]
        assert set(trained["run"]) == {"0012345678"} and set(trained["problem"]) == {"12345e6789"}


def test_a_run_without_drift_or_tokens_is_collected(suite: Suite, root: Path) -> None:
    """Every minibatch skipped: the streams are empty, the tables are not wrong."""
    folder = root / suite.runs()[0].folder
    for stream in ("positions.jsonl", "tokens.jsonl"):
        (folder / stream).write_text("")
    collect(suite, root, root / "tiny")
    assert list(read(root / "tiny", "positions").columns) == COLUMNS["positions"]
    assert len(read(root / "tiny", "positions")) == len(read(root / "tiny", "tokens")) == 0
    check(root / "tiny")


@pytest.mark.parametrize("name", ["DONE", "scores.csv"])
@pytest.mark.parametrize("which", ["bases", "runs"])
def test_unfinished_runs_are_named(suite: Suite, root: Path, name: str, which: str) -> None:
    config = getattr(suite, which)()[0]
    (root / config.folder / name).unlink()
    message = refusal(lambda: collect(suite, root, root / "tiny"), root / config.folder)
    assert message == f"{name} is missing; train and evaluate run {config.id} first"
    assert not (root / "tiny").exists()


@pytest.mark.parametrize("name", ["DONE", "scores.csv", "metrics.jsonl", "positions.jsonl", "provenance.json"])
@pytest.mark.parametrize("content", ["{", "\0"])
def test_damaged_run_files_are_named(suite: Suite, root: Path, name: str, content: str) -> None:
    path = root / suite.runs()[0].folder / name
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        collect(suite, root, root / "tiny")
    assert str(caught.value).startswith(f"{path}:") and len(str(caught.value).splitlines()) == 1
    assert not (root / "tiny").exists()


# Checking and publishing ----------------------------------------------------------------------------------------------


def test_publish_copies(tables: Path, tmp_path: Path) -> None:
    """The same bytes, also over an older publication; other files there stay."""
    target = tmp_path / "results" / "tiny"
    target.mkdir(parents=True)
    (target / "scores.csv").write_text("old")
    (target / "figures").mkdir()
    publish(tables, target)
    copied = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    sums = copied.pop(SUMS).decode().splitlines()
    assert copied == {path.name: path.read_bytes() for path in tables.iterdir()}
    assert sums == [f"{hashlib.sha256(copied[name]).hexdigest()}  {name}" for name in sorted(copied)]
    assert (target / "figures").is_dir()
    check(target)


def test_publish_on_the_command_line(
    suite: Suite, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """collect and publish as the README has them; refused with exit code 2 and one line, and then nothing is copied."""
    config, results = tmp_path / "config" / "tiny.yaml", tmp_path / "results"
    assert main(["collect", "--suite", str(config), "--root", str(root)]) == 0
    arguments = ["publish", "tiny", "--root", str(root), "--results", str(results)]
    (root / "tiny" / "tokens.parquet").rename(root / "away")
    assert main(arguments) == 2 and not results.exists()
    assert capsys.readouterr().err.startswith(f"cppo: error: {root / 'tiny' / 'tokens.parquet'}: missing")
    (root / "away").rename(root / "tiny" / "tokens.parquet")
    assert main(arguments) == 0 and len(list((results / "tiny").iterdir())) == 13
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{results / 'tiny'}: 13 files: scores.csv, ") and SUMS in said[0]
    assert "no figures yet" in said[1] and "snakemake --cores all -F paper_figures" in said[1]


def test_what_is_published_with_its_figures_verifies_at_once(
    root: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """publish copies what the workflow has drawn and says so; then verify holds, by name and by folder."""
    monkeypatch.chdir(ROOT)
    results = tmp_path / "results"
    for item in ("table1", "table3"):
        assert importlib.import_module(item).main([str(tables)]) == 0
    (results / "tiny" / "figures").mkdir(parents=True)
    (results / "tiny" / "figures" / "table9.md").write_text("of an older publication")
    capsys.readouterr()
    assert main(["publish", "tiny", "--root", str(root), "--results", str(results)]) == 0
    said = capsys.readouterr().out
    assert "19 files" in said and "figures/table1.md" in said and f"next: `cppo verify {results / 'tiny'}`" in said
    for path in (tables / "figures").iterdir():
        assert (results / "tiny" / "figures" / path.name).read_bytes() == path.read_bytes()
    for arguments in (["tiny", "--results", str(results)], [str(results / "tiny")]):
        assert main(["verify", *arguments]) == 0
        out = capsys.readouterr().out
        assert out.endswith(f"{results / 'tiny'}: verified\n") and "table3.tex" in out and "WARNING" not in out


@pytest.mark.parametrize(
    "name", [*(f"{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")), "suite.json", "configs.json"]
)
def test_missing_files(tables: Path, tmp_path: Path, name: str) -> None:
    (tables / name).unlink()
    assert refusal(lambda: publish(tables, tmp_path / "results"), tables / name).startswith("missing")
    assert not (tmp_path / "results").exists()


def test_missing_folder(tmp_path: Path) -> None:
    refusal(lambda: check(tmp_path / "nope"), tmp_path / "nope" / f"{TABLES[0]}.csv")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1}'])
@pytest.mark.parametrize("name", ["suite.json", "configs.json", "runs.csv", "scores.csv"])
def test_damaged_files(tables: Path, name: str, content: str) -> None:
    (tables / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        check(tables)
    assert str(caught.value).startswith(str(tables / name)) and len(str(caught.value).splitlines()) == 1


def edit(tables: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(read(tables, name)).to_csv(tables / f"{name}.csv", index=False)


def put(column: str, value: Any, row: int = -1) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Sets one cell."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        values = table[column].tolist()
        values[row] = value
        return table.assign(**{column: values})

    return change


EDITS: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "two numerics versions": (
        "runs",
        put("numerics", "9876543210"),
        "numerics: runs come from different numerics versions",
    ),
    "no numerics version": ("runs", put("numerics", None), "numerics: runs come from different numerics versions"),
    "unknown run": ("runs", put("run", "0123456789"), "run: not the runs of configs.json"),
    "run dropped": ("runs", lambda t: t.iloc[:-1], "run: not the runs of configs.json"),
    "run twice": ("runs", lambda t: pd.concat([t, t.iloc[-1:]]), "run: not the runs of configs.json"),
    "unknown setting": ("runs", put("setting", "nope"), "run: not the runs of configs.json"),
    "column dropped": ("runs", lambda t: t.drop(columns="commit"), "column commit is missing"),
    "one problem dropped": ("scores", lambda t: t.iloc[:-1], "3 problems, expected 4"),
    "a checkpoint dropped": ("scores", lambda t: t[t["iteration"] != 2], "iteration 2 chain1: 0 problems, expected 4"),
    "base row dropped": ("scores", lambda t: t[t["rule"] != "base"], "iteration 0 chain1: 0 problems, expected 4"),
    "a benchmark dropped": ("scores", lambda t: t[t["benchmark"] != "chain3"], "chain3: 0 problems, expected 4"),
    "problem twice": ("scores", put("problem", "200000000000"), "problem: one occurs twice"),
    "too many correct": ("scores", put("correct", 5), "correct: outside 0..samples"),
    "unjudged counted as correct": ("scores", put("correct", 4), "correct: outside 0..samples"),
    "negative": ("scores", put("correct", -1), "correct: outside 0..samples"),
    "no number": ("scores", put("correct", None), "correct: outside 0..samples"),
    "fewer samples": ("scores", put("samples", 3), "samples: not 4 in every row"),
    "an iteration dropped": ("curves", lambda t: t.iloc[1:], "3 iterations, expected 4"),
    "no curve": ("curves", lambda t: t.iloc[:0], "0 iterations, expected 4"),
}


@pytest.mark.parametrize(("name", "change", "says"), EDITS.values(), ids=EDITS)
def test_incomplete_or_mixed_tables(
    tables: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame], says: str
) -> None:
    check(tables)
    edit(tables, name, change)
    assert says in refusal(lambda: check(tables), tables / f"{name}.csv")


def test_edited_configurations(suite: Suite, tables: Path) -> None:
    """A run cannot be passed off as one with other settings, nor left out."""
    path, run = tables / "configs.json", suite.runs()[0].id
    configs = json.loads(path.read_text())
    edited = json.loads(path.read_text())
    edited[run]["rule"]["params"]["delta"] = 0.06
    for content, says in (
        (edited, f"{run}: the configuration does not have this hash"),
        ({("0" * 10 if key == run else key): value for key, value in configs.items()}, "0000000000: the configuration"),
        ({key: value for key, value in configs.items() if key != run}, "1 runs, the suite has 2"),
        ({**configs, run: 3}, f"{run}: "),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError) as caught:
            check(tables)
        assert str(caught.value).startswith(f"{path}: {says}") and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("iterations", "scored"), [(3, {2}), (4, {2}), (1, set())])
def test_a_collapsed_run_is_whole_without_the_checkpoints_it_never_reached(
    suite: Suite, root: Path, iterations: int, scored: set[int]
) -> None:
    """Also when it collapsed in the iteration of a checkpoint, which is then not saved, or before the first one."""
    folder = root / suite.runs()[0].folder
    RunFolder(folder).finish(Status(iterations, collapsed_at=iterations))
    scores = read(folder, "scores")
    scores[scores["iteration"].isin(scored)].to_csv(folder / "scores.csv", index=False)
    for stream in ("metrics", "timings", "positions"):
        path = folder / f"{stream}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:iterations]))
    (folder / "tokens.jsonl").write_text("")
    collect(suite, root, root / "tiny")
    check(root / "tiny")
    row = read(root / "tiny", "runs").set_index("rule").loc["cppo"]
    assert (row["status"], row["collapsed_at"], row["iterations"]) == ("collapsed", iterations, iterations)
    for name in TABLES:  # the whole number stays one in both formats
        table = pd.read_parquet(root / "tiny" / f"{name}.parquet")
        assert as_csv(table) == (root / "tiny" / f"{name}.csv").read_text()
    shutil.rmtree(root / "tiny")
    if scored:
        scores[scores["iteration"] == 0].to_csv(folder / "scores.csv", index=False)
        collect(suite, root, root / "tiny")
        assert "iteration 2 chain1: 0 problems" in refusal(lambda: check(root / "tiny"), root / "tiny" / "scores.csv")


@pytest.mark.parametrize("which", ["bases", "runs"])
def test_a_run_of_another_numerics_version_is_not_collected(suite: Suite, root: Path, which: str) -> None:
    path = root / getattr(suite, which)()[0].folder
    provenance = json.loads((path / "provenance.json").read_text())
    (path / "provenance.json").write_text(json.dumps(provenance | {"numerics": "0"}))
    message = refusal(lambda: collect(suite, root, root / "tiny"), path)
    assert message.startswith(
        f"it was made by numerics version 0, this code has version {NUMERICS_VERSION}; run `snakemake`"
    )
    assert not (root / "tiny").exists()


# Reading --------------------------------------------------------------------------------------------------------------


def test_text_stays_text_and_numbers_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "tokens.csv"
    path.write_text('run,token,ratio\n0012345678,NA,1\n12345e6789,"",\n1,7,inf\n')
    table = read_table(path, ["run", "token", "ratio"])
    assert table["run"].tolist() == ["0012345678", "12345e6789", "1"] and table["token"].tolist() == ["NA", "", "7"]
    assert table["ratio"].isna().tolist() == [False, True, False] and table["ratio"].iloc[2] == float("inf")
    path.write_text("run,token,ratio\n1,a,2\n1,a,x\n")
    assert refusal(lambda: read_table(path, ["ratio"]), Path(f"{path}:3")).startswith("ratio: 'x' is not a number")
    assert len(read_table(path, ["run"])) == 2  # only what is asked for is checked
    assert refusal(lambda: read_table(path, ["reason"]), path).startswith("column reason is missing")
    path.write_text('a,b\n1,"2\n')
    assert refusal(lambda: read_table(path, ["a"]), path).startswith("not a CSV table")
    path.unlink()
    assert refusal(lambda: read_table(path, ["a"]), path).startswith("missing; run the suite")
