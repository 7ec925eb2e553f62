"""Speed of the rollout engine and of one training iteration, side by side with transformers' own `generate`.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py            # prints a table and writes benchmarks/rollout.csv

Both sides sample the same prompts from the same weights at temperature 1, in alternation; the ratio is what counts, the
tokens per second depend on the machine. The model is the mini suite's, freshly initialised, so responses are long.
"""

import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cppo.models.create import EOS, PAD, create_model, create_tokenizer
from cppo.models.load import save_pretrained
from cppo.rollout.torch_engine import TorchEngine
from cppo.rollout.types import SAMPLED_ONLY, Record
from cppo.suite.config import Model
from cppo.suite.suite import load_suite
from cppo.system.seeds import uniforms
from cppo.tasks.types import TRAIN
from cppo.training.run import train

OUT = Path(__file__).with_suffix(".csv")


def main(rounds: int = 5, iterations: int = 10) -> None:
    """Measure both sides `rounds` times and train `iterations` iterations; write the table beside this file and print it."""
    run = load_suite("mini").runs()[-1]
    setting, rollout = run.setting, run.setting.rollout
    assert isinstance(setting.model, Model) and setting.vocabulary is not None
    model = create_model(setting.model, run.setting_name, len(setting.vocabulary)).eval()
    problems = setting.task.load(run.setting_name)[0][TRAIN]
    tokenizer = create_tokenizer(setting.vocabulary)
    prompts = [
        setting.task.prompt_ids(tokenizer, p.question)
        for p in problems[: rollout.prompts]
        for _ in range(rollout.responses)
    ]
    noise = uniforms(len(prompts), rollout.max_response_tokens, "benchmark")

    def ours(record: Record) -> int:
        return int(TorchEngine(model).generate(prompts, noise, 1.0, record=record).mask.sum())

    sides: dict[str, Callable[[], int]] = {
        "transformers generate()": lambda: generate(model, prompts, rollout.max_response_tokens),
        "torch engine": lambda: ours(SAMPLED_ONLY),
        "torch engine, top-4 recorded": lambda: ours(Record(top_k=4)),
        "torch engine, all recorded": lambda: ours(Record(full=True)),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            tokens = side()
            rates[name].append(tokens / (time.perf_counter() - started))
    reference = rates["transformers generate()"]
    rows: list[dict[str, object]] = [
        {
            "what": name,
            "value": round(statistics.median(values)),
            "unit": "tokens/s",
            "ratio_to_generate": round(statistics.median(v / r for v, r in zip(values, reference, strict=True)), 2),
        }
        for name, values in rates.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "base", tokenizer)
        short = run.model_copy(update={"setting": setting.model_copy(update={"iterations": iterations})})
        started = time.perf_counter()
        train(short, Path(folder) / "base", problems, Path(folder) / "run")
        seconds = round((time.perf_counter() - started) / iterations, 2)
        what = f"one training iteration ({run.rule_name})"
        rows.append({"what": what, "value": seconds, "unit": "s", "ratio_to_generate": ""})
    with OUT.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["what", "value", "unit", "ratio_to_generate"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(OUT.read_text())


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> int:
    """transformers' sampling loop on left-padded prompts, as a user would call it; returns the tokens sampled."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": tokens}
    out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=PAD, eos_token_id=EOS, **options)[:, width:]
    ended = (out == EOS).int().cumsum(-1) - (out == EOS).int()  # end tokens before this one
    return int((ended == 0).sum())


if __name__ == "__main__":
    main()
