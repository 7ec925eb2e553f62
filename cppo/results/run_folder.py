"""The folder of a run or a base model: the only place that knows how it is laid out.

    config.json  provenance.json        the configuration, and what the run was begun with; written first
    metrics.jsonl timings.jsonl positions.jsonl tokens.jsonl    streams: one JSON object per line, they only grow
    state/                              to continue from (`cppo.results.checkpoint`)
    checkpoints/iteration-N/            weights to score; the base model is iteration 0
    scores/iteration-N.csv scores.csv   the scores of those weights
    trackers/                           files of trackers that write files
    DONE                                how the run ended; written last
    LOCK                                the process that works on it (`cppo.system.lock`)

A run is made under one numerics version from its first iteration to its scores. What was begun under another version is
refused, or moved to a folder beside it (`<id>.numerics-<version>`) where the workflow asks for it. Nothing is deleted.
"""

import itertools
import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cppo.numerics import NUMERICS_VERSION
from cppo.suite.config import BaseConfig, RunConfig, parse_run
from cppo.system.files import PARTIAL, atomic_folder, read_json, write_atomic, writing

STREAMS = ("metrics", "timings", "positions", "tokens")
"""Names of the streams of a trained run."""
PROVENANCE = "provenance.json"
DONE = "DONE"
"""Name of the file that ends a run, which the workflow declares as a rule's output."""
SCORES = "scores.csv"
"""Name of the file with a run's scores, another of the workflow's outputs."""


@dataclass(frozen=True)
class Status:
    """How a run ended."""

    iterations: int
    """Iterations that it made; steps of the warm start for a base model."""
    collapsed_at: int | None = None
    """The iteration in which too many updates in a row had not been finite (a setting's `collapse_after`); None = never."""

    @property
    def state(self) -> str:
        """finished or collapsed."""
        return "finished" if self.collapsed_at is None else "collapsed"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run or a base model."""

    path: Path

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    def config(self) -> RunConfig | BaseConfig:
        """The resolved configuration. Raises ValueError when there is none, or when the folder's name is not its hash."""
        path = self.config_path
        if not path.is_file():
            raise ValueError(f"{path}: missing; train the run (or make the base model) first")
        config = parse_run(read_json(path), str(path))
        if config.id != self.path.name:
            raise ValueError(
                f"{path}: its hash is {config.id}, not the folder's name: the file was edited; train the run again"
            )
        return config

    def provenance(self) -> dict[str, Any]:
        """What it was begun with. Raises ValueError when that is missing."""
        return read_json(self.path / PROVENANCE)

    def begin(self, config: RunConfig | BaseConfig, provenance: dict[str, str], begun: bool) -> None:
        """Write configuration and provenance before any work.

        begun: whether there is saved work to continue. Raises ValueError when that was made with other code or packages.
        """
        before = self._provenance_before()
        if begun and before is not None:
            for name, version in provenance.items():
                if name != "commit" and before.get(name) != version:
                    raise ValueError(
                        f"{self.path}: it was begun with {name} {before.get(name)}, this is {version}; go back to that "
                        "version to finish it, or delete the folder to start again"
                    )
        write_atomic(self.config_path, config.model_dump_json(indent=1))
        write_atomic(self.path / PROVENANCE, json.dumps(provenance, indent=1))

    # Numerics --------------------------------------------------------------------------------------------------------

    def check_numerics(self, restart: bool = False) -> None:
        """Raise ValueError, one line, when the folder holds work of another numerics version.

        restart: move that work to a folder beside it instead, and say so; the lock stays.
        """
        before = self._provenance_before()
        version = None if before is None else before.get("numerics", "0")
        if version in (None, str(NUMERICS_VERSION)):
            return
        difference = f"{self.path}: it was made by numerics version {version}, this code has version {NUMERICS_VERSION}"
        if not restart:
            raise ValueError(f"{difference}; run `snakemake`, or delete the folder, and it is made again")
        aside = self._aside(str(version))
        print(f"{difference}; its content goes to {aside}", file=sys.stderr)
        with writing(aside):
            aside.mkdir(exist_ok=True)
            # The lock stays, for this process holds it. The provenance goes last, so that a killed move is continued.
            names = [p.name for p in self.path.iterdir() if not p.name.startswith("LOCK")]
            for name in sorted(names, key=lambda name: (name == PROVENANCE, name)):
                (self.path / name).rename(aside / name)

    def _aside(self, version: str) -> Path:
        """The folder for the content of another version: a new one, or the one of a move that was killed."""
        name = f"{self.path.name}.numerics-{version}"
        names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
        return next(path for path in map(self.path.with_name, names) if not (path / PROVENANCE).exists())

    def _provenance_before(self) -> dict[str, Any] | None:
        return self.provenance() if (self.path / PROVENANCE).is_file() else None

    # What is written while it is trained ------------------------------------------------------------------------------

    @property
    def state(self) -> Path:
        """Folder of the saved states."""
        return self.path / "state"

    @property
    def trackers(self) -> Path:
        """Folder of trackers that write files."""
        return self.path / "trackers"

    def stream(self, name: str) -> Path:
        """The file of a stream."""
        return self.path / f"{name}.jsonl"

    @property
    def streams(self) -> list[Path]:
        """The files of all streams."""
        return [self.stream(name) for name in STREAMS]

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add JSON lines to a stream."""
        path = self.stream(name)
        with writing(path), path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, allow_nan=True) + "\n" for row in rows)

    # Weights to score ------------------------------------------------------------------------------------------------

    def checkpoint(self, iteration: int) -> Path:
        """The folder of the weights after this iteration; 0 = the base model."""
        return self.path / "checkpoints" / f"iteration-{iteration}"

    def checkpoints(self) -> dict[int, Path]:
        """Iteration -> folder of its weights, in order; those that are whole."""
        folders = (self.path / "checkpoints").glob("iteration-*")
        return {_iteration(p): p for p in sorted(folders, key=_iteration) if p.suffix != PARTIAL}

    def new_checkpoint(self, iteration: int) -> AbstractContextManager[Path]:
        """A folder to fill, as `atomic_folder`, which becomes that iteration's weights."""
        return atomic_folder(self.checkpoint(iteration))

    # The end ---------------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return (self.path / DONE).is_file()

    def finish(self, status: Status, **more: int) -> None:
        """Write DONE. more: further counts, for people."""
        write_atomic(self.path / DONE, json.dumps({**asdict(status), **more}) + "\n")

    def status(self) -> Status:
        """How the run ended. Raises ValueError when DONE is missing or damaged."""
        path = self.path / DONE
        values = read_json(path)
        for name, kinds in (("iterations", (int,)), ("collapsed_at", (int, type(None)))):
            if name not in values:
                raise ValueError(f"{path}: {name} is missing; train the run again")
            if type(values[name]) not in kinds or (values[name] or 0) < 0:
                raise ValueError(
                    f"{path}: {name}: expected a whole number, got {values[name]!r:.60}; train the run again"
                )
        return Status(values["iterations"], values["collapsed_at"])

    # Scores ----------------------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Path:
        """All scores."""
        return self.path / SCORES

    def scores_of(self, iteration: int) -> Path:
        """The scores of one checkpoint, kept so that an interrupted evaluation goes on."""
        return self.path / "scores" / f"iteration-{iteration}.csv"

    def scored(self) -> list[Path]:
        """The scores of all checkpoints that were scored so far, in order."""
        return sorted((self.path / "scores").glob("iteration-*.csv"), key=_iteration)


def _iteration(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("iteration-"))
