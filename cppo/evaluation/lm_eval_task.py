"""lm-eval tasks of a setting's benchmarks: their files, and the functions that the files name.

A task names `!function utils.load` and `!function utils.process_results`. The file utils.py beside it gets both from
`task_functions`. The tasks work with this package's own evaluation and with the stock `lm_eval` command alike.
"""

import atexit
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

from cppo.rewards import Judge
from cppo.suite.config import BaseConfig, Setting
from cppo.suite.schema import parse
from cppo.system.files import read_json, write_atomic
from cppo.tasks.types import Problem, read_problems

SETTING = "setting.json"
"""Name of the file that tells the tasks of a folder which family they are of."""
UTILS = """\
from pathlib import Path

from cppo.evaluation.lm_eval_task import task_functions

load, process_results = task_functions(Path(__file__).parent)
"""
TEMPLATE = """\
task: {name}
custom_dataset: !function utils.load
dataset_kwargs: {{path: {path}}}
test_split: test
output_type: generate_until
doc_to_text: {text}
doc_to_target: "{{{{answer}}}}"
process_results: !function utils.process_results
repeats: {samples}
generation_kwargs: {{until: [], do_sample: true, temperature: {temperature}, top_p: {top_p}, top_k: 0, max_gen_toks: {tokens}}}
filter_list:
  - name: all
    filter: [{{function: take_first_k, k: {samples}}}]
metric_list:
  - {{metric: avg, aggregation: mean, higher_is_better: true}}
  - {{metric: unjudged, aggregation: mean, higher_is_better: false}}
metadata: {{version: 1}}
"""


def write_tasks(folder: Path, base: BaseConfig, problems: Callable[[str], Path]) -> None:
    """Write an lm-eval task for each benchmark of a setting, which counts every sample (Avg@k).

    problems: the benchmark's name -> the path of its problem file.
    """
    task, evaluation = base.setting.task, base.evaluation
    for benchmark in task.benchmarks:
        text = TEMPLATE.format(
            name=benchmark.name,
            path=problems(benchmark.name).resolve(),
            text=json.dumps(task.wording("{{question}}")),
            samples=evaluation.samples,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            tokens=base.setting.rollout.max_response_tokens,
        )
        write_atomic(folder / f"{benchmark.name}.yaml", text)
    # For `task_functions`: lm-eval gives a function nothing but a problem and its responses.
    write_atomic(folder / SETTING, base.setting.model_dump_json(indent=1))
    write_atomic(folder / "utils.py", UTILS)


def task_functions(folder: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(load, process_results) of the tasks in a folder of `write_tasks`, as lm-eval calls them."""
    path = folder / SETTING
    task = parse(Setting, read_json(path), str(path)).task

    def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
        """Judge all samples of one problem. avg: share of right ones among the judged; unjudged: share without a verdict."""
        problem = Problem(**doc)
        verdicts = [task.verify(response, problem, judge()) for response in results[0]]
        judged = [v for v in verdicts if v is not None]
        return {"avg": sum(judged) / max(len(judged), 1), "unjudged": 1 - len(judged) / len(verdicts)}

    return load, process_results


def load(path: str, **ignored: object) -> dict[str, datasets.Dataset]:
    """The problem file as lm-eval's data set."""
    rows = [vars(problem) for problem in read_problems(path)]
    return {"test": datasets.Dataset.from_list(rows)}


@lru_cache(maxsize=1)
def judge() -> Judge:
    """The judge of this process. lm-eval calls plain functions, which get no judge as an argument."""
    started = Judge()
    atexit.register(started.close)
    return started
