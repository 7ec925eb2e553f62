"""Small data sets in the published schemas, and a small checkpoint of a real architecture with a real tokenizer."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cppo.models.logprobs import token_logprobs
from cppo.suite.suite import Suite, load_suite
from cppo.tasks.math import DAPO_AFTER, DAPO_BEFORE

INSTRUCTION = 'Put the "final" answer within \\boxed{}.'
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
"""Qwen's, in short."""
QUESTIONS = [f"How many apples are left of {n} apples after {n - 3} were eaten?" for n in range(5, 17)]
REPEATS = 3


def dapo(question: str, answer: str, index: int = 0) -> dict[str, Any]:
    """A row of DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_BEFORE + question + DAPO_AFTER, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": str(index)},
    }


def aime(question: str, answer: str) -> dict[str, Any]:
    """A row of the AIME sets; more columns than are needed."""
    return {"id": 60, "problem": question, "answer": answer, "solution": "...", "year": "2024"}


def math500(question: str, answer: str) -> dict[str, Any]:
    """A row of MATH-500."""
    return {
        "problem": question,
        "solution": "...",
        "answer": answer,
        "subject": "Algebra",
        "level": 3,
        "unique_id": f"test/{len(question)}",
    }


TRAIN = [dapo(question, "3" if n % 2 else "5", n) for n, question in enumerate(QUESTIONS)]
AIME24 = [aime("Alice has $3$ hats. How many?", "3"), aime("Bob has $5$ hats. How many?", "5")]
MATH500 = [math500("Halve $6$.", "\\frac{6}{2}"), math500("Name it.", "\\text{Evelyn}")]
SETS: dict[str, list[dict[str, Any]]] = {
    "dapo_math_17k": TRAIN * REPEATS,
    "aime24": AIME24,
    "aime25": [aime("Carol has $7$ hats. How many?", "7")],
    "math500": MATH500,
}
"""What `write_data` writes if not told otherwise."""


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]], kind: str = "parquet") -> Path:
    """The rows as <folder>/<name>/data.<kind>, written by the `datasets` library."""
    path = folder / name / f"data.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    {"parquet": table.to_parquet, "jsonl": table.to_json, "csv": table.to_csv}[kind](str(path))
    return path


def write_data(folder: Path, **changes: list[dict[str, Any]]) -> Path:
    """Every set of SETS (with `changes`) below `folder`, in turn as parquet and JSON lines."""
    for n, (name, rows) in enumerate((SETS | changes).items()):
        write_rows(folder, name, rows, "jsonl" if n % 2 else "parquet")
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the questions, with Qwen's special tokens and a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*QUESTIONS, INSTRUCTION, "\\boxed{3} \\boxed{5}"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


def make_checkpoint(folder: Path, prompts: list[list[int]]) -> Path:
    """A Qwen3 checkpoint that answers the prompts with \\boxed{3} or \\boxed{5}, each about half of the time."""
    tokenizer = make_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    answers = [[*tokenizer(f"\\boxed{{{n}}}").input_ids, tokenizer.eos_token_id] for n in (3, 5)]
    assert len(answers[0]) == len(answers[1])
    rows = [prompt for prompt in prompts for _ in answers]
    responses = torch.tensor([answer for _ in prompts for answer in answers])
    mask = torch.ones_like(responses, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = -token_logprobs(model, rows, responses, mask, temperature=1.0).logp.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def raw_suite(data: Path, checkpoint: Path) -> dict[str, Any]:
    """A suite of one setting on the sets of SETS and a local checkpoint, as plain data."""
    task = {
        "family": "math",
        "train": {"name": "dapo_math_17k", "rows": REPEATS * len(TRAIN)},
        "benchmarks": [{"name": name, "problems": len(SETS[name])} for name in ("aime24", "aime25", "math500")],
        "data_dir": str(data),
        "prompt": "chat",
        "instruction": INSTRUCTION,
        "max_prompt_tokens": 200,
    }
    setting = {
        "title": "Tiny",
        "model": {"name": str(checkpoint)},
        "task": task,
        "rollout": {"prompts": 4, "responses": 4, "minibatch": 2, "max_response_tokens": 8},
        "optimizer": {"lr": 1e-3},
        "iterations": 2,
        "checkpoint_every": 1,
    }
    divergence = {"estimator": "top_k", "k": 4}
    rules = [
        {"name": "cppo", "objective": "cppo", "divergence": divergence},
        {"name": "grpo", "objective": "grpo"},
    ]
    return {
        "description": "Mathematics in words, small.",
        "seeds": [0],
        "settings": {"tiny": setting},
        "evaluation": {"samples": 8},
        "rules": rules,
    }


def write_suite(path: Path, raw: dict[str, Any]) -> Suite:
    """The suite written to `path` and loaded."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(raw))))
    return load_suite(path)
