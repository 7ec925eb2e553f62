"""The warm start: supervised training that makes a setting's base model, stopping on sampled accuracy.

One a setting, shared by all its runs; the demonstrations are noisy on purpose (see `cppo.problems`).
"""

import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo.config import BaseConfig, Model, Task
from cppo.files import whole_folder, write_whole
from cppo.policy import EOS, create_model, create_tokenizer, save_pretrained, statistics
from cppo.problems import Problem, demonstrations
from cppo.provenance import provenance
from cppo.rewards import Judge
from cppo.rollout.torch_engine import TorchEngine
from cppo.seeds import uniforms

CHECK_RESPONSES = 256
"""Responses sampled in one measurement of the accuracy."""


def warm_start(config: BaseConfig, problems: tuple[Problem, ...], folder: Path) -> None:
    """Train until the target accuracy and write the model to `folder`/checkpoints/step-0, with config and provenance.

    Raises ValueError when the accuracy is not reached within `max_steps`.
    """
    plan, task = config.plan.warm_start, config.plan.task
    assert plan is not None and isinstance(config.plan.model, Model) and isinstance(task, Task)
    tokenizer = create_tokenizer()
    model = create_model(config.plan.model, config.setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
    examples = demonstrations(task, config.setting)
    log: list[dict[str, float]] = []
    bar = tqdm(range(1, plan.max_steps + 1), desc=f"base {config.setting}", unit="step", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, plan.lr, plan.warmup_steps, plan.max_steps)
        loss = _loss(model, tokenizer, list(itertools.islice(examples, plan.batch)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % plan.check_every == 0:
            accuracy = sampled_accuracy(model, tokenizer, problems, config)
            log.append({"step": step, "loss": loss.item(), "accuracy": accuracy})
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
            if accuracy >= plan.target_accuracy:
                break
    else:
        raise ValueError(
            f"warm_start of setting {config.setting}: accuracy {log[-1]['accuracy'] if log else 0:.3f} after max_steps "
            f"{plan.max_steps} is below target_accuracy {plan.target_accuracy}; raise max_steps or lower the target"
        )
    with whole_folder(folder / "checkpoints" / "step-0") as checkpoint:
        save_pretrained(model, checkpoint)
    write_whole(folder / "config.json", config.model_dump_json(indent=1))
    write_whole(folder / "provenance.json", json.dumps(provenance(), indent=1))
    write_whole(folder / "warm_start.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    write_whole(folder / "DONE", json.dumps({"status": "finished", "steps": step}) + "\n")


def _learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then cosine to a tenth of the peak."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[tuple[str, str]]) -> Tensor:
    """Mean negative log-likelihood of the responses' tokens, end of sequence included."""
    prompts = [tokenizer(question).input_ids for question, _ in examples]
    texts = [[*tokenizer(response).input_ids, EOS] for _, response in examples]
    lengths = torch.tensor([len(ids) for ids in texts])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    responses = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(
        mask, torch.tensor(list(itertools.chain(*texts)))
    )
    return -statistics(model, prompts, responses, mask, temperature=1.0).logp.sum() / mask.sum()


def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: tuple[Problem, ...], config: BaseConfig
) -> float:
    """Share of right answers at temperature 1, one response to each of the first training problems."""
    asked = list(itertools.islice(itertools.cycle(problems), CHECK_RESPONSES))
    prompts = [tokenizer(p.question).input_ids for p in asked]
    noise = uniforms(len(asked), config.plan.rollout.max_response_tokens, "warm start check", config.setting)
    rollouts = TorchEngine(model).generate(prompts, noise, temperature=1.0)
    texts = tokenizer.batch_decode(rollouts.responses, skip_special_tokens=True)
    with Judge() as judge:
        verdicts = [judge.verdict(text, p.answer) for text, p in zip(texts, asked, strict=True)]
    return sum(v == 1.0 for v in verdicts) / len(verdicts)
