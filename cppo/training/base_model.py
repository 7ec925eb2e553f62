"""A setting's base model, one for all its runs: a published checkpoint, or the outcome of a warm start.

The warm start is supervised training that stops at a sampled accuracy. Its demonstrations are noisy on purpose (see
`cppo.tasks.noise`). A published checkpoint is linked, not copied.
"""

import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo.models.create import EOS, create_model, create_tokenizer
from cppo.models.load import check_harmless, device_of, load_config, load_tokenizer, save_pretrained
from cppo.models.logprobs import token_logprobs
from cppo.results.provenance import provenance
from cppo.results.run_folder import RunFolder, Status
from cppo.rewards import Judge
from cppo.rollout.torch_engine import TorchEngine
from cppo.suite.config import BaseConfig, Model, Pretrained
from cppo.system.files import read_json, sha256, write_atomic, writing
from cppo.system.hub import fetch
from cppo.system.seeds import uniforms
from cppo.tasks.types import GeneratedTask, Problem, Task, TextTask

CHECK_RESPONSES = 256
"""Responses sampled in one measurement of the accuracy."""
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""Files that are fetched of a published checkpoint: configuration, weights, tokenizer; no code and no pickles."""


def make_base(config: BaseConfig, problems: tuple[Problem, ...], path: Path) -> None:
    """Make the base model in its folder: by a warm start, or from the published checkpoint.

    Raises ValueError, one line, when it cannot be made.
    """
    folder = RunFolder(path)
    if folder.done:
        return
    make = link_published if config.setting.warm_start is None else warm_start
    make(config, problems, folder)


def warm_start(config: BaseConfig, problems: tuple[Problem, ...], folder: RunFolder) -> None:
    """Train a created model on demonstrations until its target accuracy, and write it as the folder's checkpoint 0.

    Raises ValueError when the accuracy is not reached within `max_steps`.
    """
    warm, task, setting_name = config.setting.warm_start, config.setting.task, config.setting_name
    assert warm is not None and isinstance(config.setting.model, Model) and isinstance(task, GeneratedTask)
    tokenizer = create_tokenizer(task.vocabulary)
    model = create_model(config.setting.model, setting_name, len(task.vocabulary)).to(device_of(config.setting.scale))
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm.lr, betas=warm.betas, weight_decay=warm.weight_decay)
    examples = task.demonstrations(setting_name)
    log: list[dict[str, float]] = []
    bar = tqdm(range(1, warm.max_steps + 1), desc=f"base {setting_name}", unit="step", mininterval=2)
    with Judge() as judge:
        judge.start()
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, warm.lr, warm.warmup_steps, warm.max_steps)
            loss = _loss(model, tokenizer, task, list(itertools.islice(examples, warm.batch)))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), warm.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            if step % warm.check_every == 0:
                accuracy = sampled_accuracy(model, tokenizer, problems, config, judge)
                log.append({"step": step, "loss": loss.item(), "accuracy": accuracy})
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
                if accuracy >= warm.target_accuracy:
                    break
        else:
            raise ValueError(
                f"warm_start of setting {setting_name}: accuracy {log[-1]['accuracy'] if log else 0:.3f} after max_steps "
                f"{warm.max_steps} is below target_accuracy {warm.target_accuracy}; raise max_steps or lower the target"
            )
    with folder.new_checkpoint(0) as checkpoint:
        save_pretrained(model, checkpoint, tokenizer)
    write_atomic(folder.path / "warm_start.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    folder.begin(config, provenance(), begun=False)
    folder.finish(Status(step))


def link_published(config: BaseConfig, problems: tuple[Problem, ...], folder: RunFolder) -> None:
    """Fetch or find the published checkpoint, check it, and link the folder's checkpoint 0 to it.

    Beside configuration and provenance, source.json says what was linked, and DONE how many training problems are short enough.
    Raises ValueError, one line, when it is not to be found, or could not be trained on the task.
    """
    model, task = config.setting.model, config.setting.task
    assert isinstance(model, Pretrained) and isinstance(task, TextTask)
    if model.revision is None:
        checkpoint = Path(model.name).resolve()
        files = sorted(path for path in checkpoint.glob("*") if path.suffix in (".json", ".safetensors"))
        source: dict[str, object] = {"sha256": {path.name: sha256(path) for path in files}}
    else:
        remedy = "with a copy at hand, name its folder as model: {name: /path/to/it}"
        checkpoint = fetch(model.name, "model", model.revision, CHECKPOINT_FILES, remedy)
        source = {"name": model.name, "revision": model.revision}
    longest = task.max_prompt_tokens + config.setting.rollout.max_response_tokens
    tokenizer = check_checkpoint(checkpoint, task, longest)
    kept = task.short_enough(tokenizer, problems)
    link = folder.checkpoint(0)
    with writing(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint, target_is_directory=True)
    write_atomic(folder.path / "source.json", json.dumps(source, indent=1))
    folder.begin(config, provenance(), begun=False)
    folder.finish(Status(0), problems=len(kept), too_long=len(problems) - len(kept))


def check_checkpoint(folder: Path, task: TextTask, longest: int) -> PreTrainedTokenizerFast:
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
        raise ValueError(f"{folder}: config.json: architectures {config.architectures} is not a causal language model")
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


def _loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, examples: list[tuple[str, str]]
) -> Tensor:
    """Mean negative log-likelihood of the responses' tokens, the end token included, in nats."""
    prompts = [task.prompt_ids(tokenizer, question) for question, _ in examples]
    texts = [[*tokenizer(response).input_ids, EOS] for _, response in examples]
    lengths = torch.tensor([len(ids) for ids in texts])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    responses = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(
        mask, torch.tensor(list(itertools.chain(*texts)))
    )
    responses, mask = responses.to(model.device), mask.to(model.device)
    return -token_logprobs(model, prompts, responses, mask, temperature=1.0).logp.sum() / mask.sum()


def sampled_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: tuple[Problem, ...],
    config: BaseConfig,
    judge: Judge,
) -> float:
    """Share of right answers at temperature 1, from one response to each of the first `CHECK_RESPONSES` training problems."""
    task, tokens = config.setting.task, config.setting.rollout.max_response_tokens
    checked = list(itertools.islice(itertools.cycle(problems), CHECK_RESPONSES))
    prompts = [task.prompt_ids(tokenizer, p.question) for p in checked]
    noise = uniforms(len(checked), tokens, "warm start check", config.setting_name)
    rollouts = TorchEngine(model).generate(prompts, noise, temperature=1.0)
    texts = tokenizer.batch_decode(rollouts.responses, skip_special_tokens=True)
    verdicts = [task.verify(text, p, judge) for text, p in zip(texts, checked, strict=True)]
    return sum(v == 1.0 for v in verdicts) / len(verdicts)
