"""From a problem's bare question to the tokens that a model is given: one place for training and for evaluation.

A question of the chain is its own prompt. A question in words is followed by the task's instruction; for a chat model
that is the user's message, which the tokenizer's chat template wraps, for a base model it is the whole prompt.
"""

import sys

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from cppo.suite.config import MathTask, Task
from cppo.tasks.types import Problem


def wording(task: Task | MathTask, question: str) -> str:
    """What the model is asked, as text; also lm-eval's `doc_to_text`."""
    return f"{question}\n{task.instruction}" if isinstance(task, MathTask) else question


def encode(task: Task | MathTask, tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The token ids of a prompt whose `wording` is `text`."""
    if isinstance(task, Task) or task.prompt == "base":
        ids: list[int] = tokenizer(text).input_ids
        return ids
    flag = {} if task.enable_thinking is None else {"enable_thinking": task.enable_thinking}
    message = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False, **flag)
    return ids


def prompt_ids(task: Task | MathTask, tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The token ids of the prompt for a question."""
    return encode(task, tokenizer, wording(task, question))


def short_enough(
    task: Task | MathTask, tokenizer: PreTrainedTokenizerFast, problems: tuple[Problem, ...]
) -> tuple[Problem, ...]:
    """The problems whose prompts have at most `max_prompt_tokens` tokens; says how many have more.

    Raises ValueError when none is left.
    """
    if isinstance(task, Task):
        return problems
    limit = task.max_prompt_tokens
    kept = tuple(p for p in problems if len(prompt_ids(task, tokenizer, p.question)) <= limit)
    if not kept:
        raise ValueError(f"task.max_prompt_tokens: every training prompt is longer than {limit} tokens; raise it")
    if len(kept) < len(problems):
        left_out = len(problems) - len(kept)
        tqdm.write(
            f"{left_out} of {len(problems)} training problems left out: prompt above {limit} tokens", file=sys.stderr
        )
    return kept
