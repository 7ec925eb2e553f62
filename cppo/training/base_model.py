"""A setting's base model, one for all its runs: a published checkpoint, or the outcome of a warm start.

The warm start is supervised training that stops on sampled accuracy; its demonstrations are noisy on purpose (see
`cppo.tasks.types`). A published checkpoint is linked, not copied.
"""

import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo.models.create import create_model, create_tokenizer
from cppo.models.load import check_harmless, load_config, load_tokenizer, save_pretrained
from cppo.models.logprobs import EOS, statistics
from cppo.results.provenance import provenance
from cppo.rewards import Judge
from cppo.rollout.torch_engine import TorchEngine
from cppo.suite.config import BaseConfig, MathTask, Model, Pretrained, Task
from cppo.system.files import read_json, sha256, whole_folder, write_whole, writing
from cppo.system.hub import fetch
from cppo.system.seeds import uniforms
from cppo.tasks.chain import demonstrations
from cppo.tasks.prompts import short_enough
from cppo.tasks.types import Problem
from cppo.training.distributed import device_of

CHECK_RESPONSES = 256
"""Responses sampled in one measurement of the accuracy."""
FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""What is fetched of a published checkpoint: configuration, weights, tokenizer; no code and no pickles."""


def warm_start(config: BaseConfig, problems: tuple[Problem, ...], folder: Path) -> None:
    """Train until the target accuracy and write the model to `folder`/checkpoints/step-0, with config and provenance.

    Raises ValueError when the accuracy is not reached within `max_steps`.
    """
    plan, task = config.plan.warm_start, config.plan.task
    assert plan is not None and isinstance(config.plan.model, Model) and isinstance(task, Task)
    tokenizer = create_tokenizer()
    model: PreTrainedModel = create_model(config.plan.model, config.setting).to(device_of(config.plan.scale))
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
    examples = demonstrations(task, config.setting)
    log: list[dict[str, float]] = []
    bar = tqdm(range(1, plan.max_steps + 1), desc=f"base {config.setting}", unit="step", mininterval=2)
    with Judge() as judge:
        judge.start()
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, plan.lr, plan.warmup_steps, plan.max_steps)
            loss = _loss(model, tokenizer, list(itertools.islice(examples, plan.batch)))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            if step % plan.check_every == 0:
                accuracy = sampled_accuracy(model, tokenizer, problems, config, judge)
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
        save_pretrained(model, checkpoint, tokenizer)
    write_whole(folder / "warm_start.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    _finish(config, folder, {"steps": step})


def _finish(config: BaseConfig, folder: Path, done: dict[str, int]) -> None:
    write_whole(folder / "config.json", config.model_dump_json(indent=1))
    write_whole(folder / "provenance.json", json.dumps(provenance(), indent=1))
    write_whole(folder / "DONE", json.dumps({"status": "finished", **done}) + "\n")


def published(config: BaseConfig, problems: tuple[Problem, ...], folder: Path) -> None:
    """Fetch or find the published checkpoint, check it, and link `folder`/checkpoints/step-0 to it.

    Beside config and provenance, source.json says what was linked, and DONE how many training problems are short enough.
    Raises ValueError, one line, when it cannot be had or could not be trained on the task.
    """
    model, task = config.plan.model, config.plan.task
    assert isinstance(model, Pretrained) and isinstance(task, MathTask)
    if model.revision is None:
        found = Path(model.name).resolve()
        sums = {path.name: sha256(path) for path in sorted(found.glob("*")) if path.suffix in (".json", ".safetensors")}
        source: dict[str, object] = {"sha256": sums}
    else:
        remedy = "with a copy at hand, name its folder as model: {name: /path/to/it}"
        found = fetch(model.name, "model", model.revision, FILES, remedy)
        source = {"name": model.name, "revision": model.revision}
    longest = task.max_prompt_tokens + config.plan.rollout.max_response_tokens
    tokenizer = check_checkpoint(found, task, longest)
    kept = short_enough(task, tokenizer, problems)
    link = folder / "checkpoints" / "step-0"
    with writing(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(found, target_is_directory=True)
    write_whole(folder / "source.json", json.dumps(source, indent=1))
    _finish(config, folder, {"steps": 0, "problems": len(kept), "too_long": len(problems) - len(kept)})


def check_checkpoint(folder: Path, task: MathTask, longest: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint that can be trained on `task` with sequences of `longest` tokens.

    Raises ValueError, one line naming the folder, unless it is a whole causal language model in safetensors whose
    tokenizer has an end token and, where the task asks for one, a chat template.
    """
    check_harmless(folder)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing; a checkpoint must hold all its weights as safetensors")
    if not any(name.endswith("ForCausalLM") for name in config.architectures or ()):
        raise ValueError(f"{folder}: config.json: architectures {config.architectures} is no causal language model")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no end token (eos_token), so no response would ever end")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    if task.prompt == "chat" and tokenizer.chat_template is None:
        raise ValueError(f"{folder}: the tokenizer has no chat template; take task.prompt: base")
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"{folder}: max_prompt_tokens + max_response_tokens are {longest}, the model's longest sequence is "
            f"{config.max_position_embeddings}"
        )
    return tokenizer


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
    responses, mask = responses.to(model.device), mask.to(model.device)
    return -statistics(model, prompts, responses, mask, temperature=1.0).logp.sum() / mask.sum()


def sampled_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: tuple[Problem, ...],
    config: BaseConfig,
    judge: Judge,
) -> float:
    """Share of right answers at temperature 1, one response to each of the first training problems."""
    asked = list(itertools.islice(itertools.cycle(problems), CHECK_RESPONSES))
    prompts = [tokenizer(p.question).input_ids for p in asked]
    noise = uniforms(len(asked), config.plan.rollout.max_response_tokens, "warm start check", config.setting)
    rollouts = TorchEngine(model).generate(prompts, noise, temperature=1.0)
    texts = tokenizer.batch_decode(rollouts.responses, skip_special_tokens=True)
    verdicts = [judge.verdict(text, p.answer) for text, p in zip(texts, asked, strict=True)]
    return sum(v == 1.0 for v in verdicts) / len(verdicts)
