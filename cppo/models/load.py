"""Checkpoint folders: written, and read without ever running their code or unpickling anything."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cppo.suite.config import Scale
from cppo.system.files import read_json

PROBED_TOKENS = 8
"""Tokens on which a loaded model's logits are compared with a plain linear head's."""
PROBED_LOGIT = 100.0
"""The largest logit of that comparison: soft caps, which published models set to 30 or 50, change a logit of this size."""
HEAD_TOLERANCE = 1e-3
"""Largest error of that comparison, relative to the largest logit."""


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer as an ordinary Hugging Face checkpoint (safetensors).

    weights: what is written instead of the model's own.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def load_pretrained(folder: str | Path) -> PreTrainedModel:
    """The float32 model in a checkpoint folder. Never runs code from the folder and never unpickles anything.

    Raises ValueError, one line that names the folder, when there is none, or one that the trainer would take for another
    model (`check_head`).
    """
    folder = Path(folder)
    check_harmless(folder)
    model = _loaded(AutoModelForCausalLM, folder, dtype=torch.float32, use_safetensors=True)
    assert isinstance(model, PreTrainedModel)
    check_head(model, folder)
    return model


@torch.no_grad()
def check_head(model: PreTrainedModel, folder: Path) -> None:
    """Raise ValueError unless the model's logits are its last hidden states times the weight of its output head.

    The trainer and the torch engine apply the head themselves, in chunks. Some architectures scale the logits (Granite), cap
    them softly (Gemma 2) or shift them by a bias. Such a model would be trained, sampled and scored as another model, and
    every comparison between trainer and engine would agree.
    """
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(f"{folder}: the model has no linear output head; take a checkpoint of another architecture")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{folder}: the output head has a bias, which is not supported; take another checkpoint")
    ids = torch.arange(PROBED_TOKENS).remainder(len(head.weight)).unsqueeze(0)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    plain = torch.nn.functional.linear(hidden, head.weight).float()
    # An untrained model's logits are so small that a cap leaves them alone, so the head's output is made larger.
    factor = PROBED_LOGIT / float(plain.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    hook = head.register_forward_hook(lambda module, inputs, output: output * factor)
    logits = model(input_ids=ids).logits.float()
    hook.remove()
    error = float((plain * factor - logits).abs().max()) / PROBED_LOGIT
    if not error <= HEAD_TOLERANCE:
        raise ValueError(
            f"{folder}: its logits differ by {error:.1%} from the last hidden states times the output head's weight (by "
            "scaling or soft-capping), which is not supported; take a checkpoint of another architecture"
        )


def check_harmless(folder: Path) -> None:
    """Raise ValueError for a checkpoint whose files would make transformers unpickle, run code or read elsewhere.

    `trust_remote_code` and `use_safetensors` do not prevent all of that. transformers (5.17) unpickles files that an index of
    safetensors names, and takes an attention's implementation from a repository that config.json names.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a Hugging Face checkpoint (config.json is missing)")
    config = read_json(folder / "config.json")
    for key, value in config.items():
        if key.lower().endswith(("_implementation", "_implementation_internal")) and not _is_plain(value):
            raise ValueError(
                f"{folder / 'config.json'}: {key}: {value!r:.80} may name code in a repository, which is never run; "
                "remove the key"
            )
    index = folder / "model.safetensors.index.json"
    files = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(files, dict):
        raise ValueError(f"{index}: weight_map: not an object; take the checkpoint again from where it was published")
    for name in files.values():
        if not (isinstance(name, str) and name.endswith(".safetensors") and name == Path(name).name):
            raise ValueError(
                f"{index}: weight_map: {name!r:.80} is not a safetensors file of this folder; pickled weights are never loaded"
            )
    if not list(folder.glob("*.safetensors")):
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "nothing else"
        raise ValueError(
            f"{folder}: holds no weights as safetensors but {pickled}; pickled weights are never loaded, as they may run code: "
            "convert them where you trust them, with save_pretrained(..., safe_serialization=True)"
        )


def _is_plain(implementation: object) -> bool:
    """Whether this is None or the name of something in transformers itself."""
    return implementation is None or (isinstance(implementation, str) and implementation.isidentifier())


def load_config(folder: str | Path) -> PreTrainedConfig:
    """The model's configuration in a checkpoint folder. Never runs code from it. Raises ValueError when there is none."""
    config = _loaded(AutoConfig, Path(folder))
    assert isinstance(config, PreTrainedConfig)
    return config


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a checkpoint folder. Never runs code from it. Raises ValueError when there is none."""
    tokenizer = _loaded(AutoTokenizer, Path(folder))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder}: its tokenizer is not a fast one (tokenizer.json is missing or of another kind)")
    return tokenizer


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    """transformers' object from a local folder. A damaged or hostile folder fails in many ways there; each is one line here."""
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # tokenizers and safetensors raise nothing narrower
        reason = " ".join("".join(c if c.isprintable() else " " for c in f"{error or type(error).__name__}").split())[
            :300
        ]
        if "trust_remote_code" in str(error):
            reason = (
                "it needs code of its own (auto_map), which is never run; take one that transformers knows by itself"
            )
        raise ValueError(f"{folder}: not a loadable checkpoint: {reason}") from None


def device_of(scale: Scale | None) -> torch.device:
    """The device of a process that works alone: a GPU where there is one and the setting has a `scale`, else the CPU."""
    return (scale is not None and torch.accelerator.current_accelerator(check_available=True)) or torch.device("cpu")
