"""Checkpoints and data are read, never run: no code of theirs, no pickle, no way to switch either on."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DENSE, ROOT, chain_model, chain_tokenizer

from cppo.models.load import load_pretrained, load_tokenizer, save_pretrained
from cppo.suite.suite import Suite

AUDIT = ROOT / "tests" / "faults" / "audit"
EVIL = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import PreTrainedTokenizerFast as Tokenizer, Qwen3Config as Config, Qwen3ForCausalLM as Model
"""


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A good one, with a module beside it that would leave a canary."""
    folder = tmp_path / "checkpoint"
    save_pretrained(chain_model(DENSE, "x"), folder, chain_tokenizer())
    (folder / "evil.py").write_text(EVIL.format(canary=str(tmp_path / "canary")))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


def refusal(folder: Path, load: Any = load_pretrained) -> str:
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and len(message.splitlines()) == 1, message
    return message


def test_a_checkpoint_brings_no_code(checkpoint: Path, tmp_path: Path) -> None:
    """Of a known architecture: loaded with transformers' own class."""
    edit(checkpoint / "config.json", auto_map=AUTO_MAP)
    edit(checkpoint / "tokenizer_config.json", auto_map=AUTO_MAP)
    assert type(load_pretrained(checkpoint)).__module__.startswith("transformers.")
    assert type(load_tokenizer(checkpoint)).__module__.startswith("transformers.")
    assert not (tmp_path / "canary").exists()


def test_an_architecture_of_its_own_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "config.json", auto_map=AUTO_MAP, model_type="evil", architectures=["Model"])
    says = refusal(checkpoint)
    assert "code of its own" in says and "trust_remote_code" not in says
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_of_its_own_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Tokenizer")
    try:
        assert type(load_tokenizer(checkpoint)).__module__.startswith("transformers.")
    except ValueError as error:
        assert str(error).startswith(str(checkpoint))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model-00001.pt"])
def test_pickled_weights_are_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Whatever they are called, and when an index names them: the file and what to do about it are said."""
    (checkpoint / "model.safetensors").unlink()
    torch.save({"x": Touch(tmp_path / "canary")}, checkpoint / name)
    if name.endswith(".pt"):
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    says = refusal(checkpoint)
    assert ("deserializing header" if name == "model.safetensors" else "safetensors") in says
    if name != "model.safetensors":
        assert name in says and "pickled weights are never loaded" in says
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "", None, ["x"]])
def test_weights_are_read_from_the_folder_only(checkpoint: Path, name: object) -> None:
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}))
    assert "weight_map" in refusal(checkpoint)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "evil/kernel@main:f", {"": "evil/kernel"}, "flash|evil/kernel"])
def test_no_code_from_a_repository_that_the_configuration_names(checkpoint: Path, key: str, value: object) -> None:
    edit(checkpoint / "config.json", **{key: value})
    assert f"config.json: {key}: " in refusal(checkpoint)


def test_a_pickle_beside_good_weights_is_ignored(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"x": Touch(tmp_path / "canary")}, checkpoint / name)
    load_pretrained(checkpoint)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[" * 100_000),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", b""),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\x80\x04."),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_damaged_checkpoints_are_one_line(checkpoint: Path, file: str, content: bytes) -> None:
    (checkpoint / file).write_bytes(content)
    refusal(checkpoint, load_tokenizer if file == "tokenizer.json" else load_pretrained)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": "x"}, {"vocab_size": -1}, {"hidden_size": 32}, {"model_type": "nope"}, {"model_type": 3}]
)
def test_impossible_checkpoints_are_one_line(checkpoint: Path, changes: dict[str, Any]) -> None:
    edit(checkpoint / "config.json", **changes)
    refusal(checkpoint)


def test_no_setting_and_no_source_line_trusts_remote_code() -> None:
    """Every call that could run a checkpoint's code says that it must not, and nothing unpickles."""
    assert "trust_remote_code" not in json.dumps(Suite.model_json_schema())
    for path in (ROOT / "cppo").rglob("*.py"):
        text = path.read_text()
        for call in re.finditer(r"\.from_pretrained\(", text):
            depth, end = 0, call.end() - 1
            while end == call.end() - 1 or depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            assert "trust_remote_code=False" in text[call.start() : end], f"{path}: {text[call.start() : end]}"
        assert not re.search(
            r"trust_remote_code\s*=\s*True|torch\.load\(|import pickle|joblib|dill|allow_pickle=True", text
        ), path


# The audit hook of the smoke suite ------------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(AUDIT), str(ROOT)])}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def test_the_hook_ends_a_process_that_unpickles(tmp_path: Path) -> None:
    """From a file, by either implementation, through torch, also inside a broad except; its children are watched too."""
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps(Touch(tmp_path / "canary")))
    read = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    slow = "import pickle, sys\ntry: pickle._Unpickler(open(sys.argv[1], 'rb')).load()\nexcept BaseException: pass"
    child = (
        f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {read!r}, sys.argv[1]]).returncode)"
    )
    for code in (read, slow, child):
        done = python(code, str(file))
        assert done.returncode == 66 and "audit: " in done.stderr and "Path.touch" in done.stderr, (code, done)
    assert not (tmp_path / "canary").exists()


def test_the_hook_lets_plain_data_and_multiprocessing_through() -> None:
    code = "import multiprocessing, pickle, pathlib\nif __name__ == '__main__':\n"
    code += "    pickle.loads(pickle.dumps({'a': [1, 'x']}))\n"
    code += "    with multiprocessing.get_context('fork').Pool(1) as pool: print(pool.apply(pathlib.Path, ('a',)))"
    done = python(code)
    assert done.returncode == 0 and done.stdout == "a\n", done.stderr


def test_the_smoke_suite_runs_under_the_hook() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\nsmoke:")[1].split("\n\n")[0]
    assert "PYTHONPATH=$(CURDIR)/tests/faults/audit" in recipe
