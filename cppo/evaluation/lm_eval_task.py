"""What our lm-eval task files call: `!function utils.load`, `!function utils.process_results`.

Works with this package's own evaluation and with the stock `lm_eval` command alike.
"""

import atexit
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

from cppo.rewards import Judge
from cppo.system.files import write_whole
from cppo.tasks.types import read_problems

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


def write_task(
    folder: Path, name: str, problems: Path, text: str, samples: int, temperature: float, top_p: float, tokens: int
) -> None:
    """Write the lm-eval task `name` over a problem file: Avg@`samples`, every sample counted.

    text: what is asked, with {{question}} for the question.
    """
    task = TEMPLATE.format(
        name=name,
        path=problems.resolve(),
        text=json.dumps(text),
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        tokens=tokens,
    )
    write_whole(folder / f"{name}.yaml", task)
    write_whole(folder / "utils.py", "from cppo.evaluation.lm_eval_task import load, process_results  # noqa: F401\n")


def load(path: str, **ignored: object) -> dict[str, datasets.Dataset]:
    """The problem file as lm-eval's data set."""
    rows = [vars(problem) for problem in read_problems(path)]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Judge all samples of one problem: avg = right ones among the judged, unjudged = share without a verdict."""
    verdicts = [judge().verdict(response, doc["answer"]) for response in results[0]]
    judged = [v for v in verdicts if v is not None]
    return {"avg": sum(judged) / max(len(judged), 1), "unjudged": 1 - len(judged) / len(verdicts)}


@lru_cache(maxsize=1)
def judge() -> Judge:
    """One judge a process; lm-eval calls plain functions, so there is nobody to hand it in."""
    found = Judge()
    atexit.register(found.close)
    return found
