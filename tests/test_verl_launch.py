"""Trainer verl beside the installed verl: its configuration accepts the command, its classes read and write our files.

Skipped where verl is not installed: it needs an environment of its own (`make venv-verl`, `make test-verl`).
"""

import asyncio
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixture import random_tokens
from tiny import BINARY_TV, ROOT, run_of, verl_suite

from cppo import advantages
from cppo.integrations import SampledTokenLoss, verl_checks, verl_command, verl_launch
from cppo.objectives import names
from cppo.results.run_folder import RunFolder
from cppo.rewards import overlong_penalty
from cppo.suite.config import RunConfig
from cppo.suite.suite import load_suite
from cppo.tasks.types import problem

pytest.importorskip("verl", reason="verl is not installed; it has an environment of its own: make test-verl")
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from tensordict import TensorDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler, need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.tracking import Tracking

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
PROBLEMS = tuple(problem(f"What is {i} + 1 ?", str(i + 1), "dapo_math_17k", 1) for i in range(9))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint folder of the smallest kind that verl's model configuration reads."""
    folder = tmp_path / "base"
    words = ["<pad>", "<eos>", "<unk>", "What", "is", "+", "?", *map(str, range(11))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT)
    made.save_pretrained(folder)
    Qwen3Config(vocab_size=len(words), architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
    return folder


def composed(words: list[str]) -> Any:
    """verl's configuration under a command of ours, in struct mode: a key it does not have is an error."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", words)


def rendered(run: RunConfig, suite: Any, base: Path, folder: Path, **more: Any) -> list[str]:
    return verl_command.command(run, suite.resources["moe"], base, folder, **more)[3:]


def validated(config: Any) -> Any:
    """What `main_ppo` checks before it starts Ray, and the actor's configuration that the workers get."""
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert not need_reference_policy(config)
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


@pytest.mark.parametrize("sharding", ["fsdp2", "megatron"])
@pytest.mark.parametrize("name", names())
def test_verl_accepts_every_objective(name: str, sharding: str, base: Path, tmp_path: Path) -> None:
    suite = verl_suite(tmp_path, {"scale": {"sharding": sharding}})
    run = run_of(suite, name)
    actor = validated(composed(rendered(run, suite, base, tmp_path / "run")))
    entry = run.rule
    divergence = BINARY_TV if entry.divergence else None
    assert actor.policy_loss.rule == SampledTokenLoss.of(name, entry.params, divergence)
    assert actor.strategy == sharding and actor.policy_loss.loss_mode == f"cppo_bench_{name}"


def test_verl_accepts_the_papers_largest_setting(base: Path, tmp_path: Path) -> None:
    """Every rule of config/paper.yaml that it trains."""
    suite = load_suite(ROOT / "config" / "paper.yaml")
    runs = [run for run in suite.runs() if run.setting.trainer == "verl"]
    assert len(runs) == len(suite.rules) * len(suite.seeds)
    for run in runs:
        words = verl_command.command(run, suite.resources[run.setting_name], base, tmp_path / "run")[3:]
        actor = validated(composed(words))
        assert actor.loss_scale_factor == 16384 and actor.policy_loss.loss_mode == f"cppo_bench_{run.rule.objective}"


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_reaches_the_chat_template(thinking: bool, base: Path, tmp_path: Path) -> None:
    suite = verl_suite(tmp_path, {"task": {"enable_thinking": thinking}})
    config = composed(rendered(suite.runs()[0], suite, base, tmp_path / "run"))
    validated(config)
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": thinking}


@pytest.mark.parametrize("advantage", verl_checks.VERL_ADVANTAGES)
@pytest.mark.parametrize("sharding", ["fsdp2", "megatron"])
def test_verl_accepts_every_advantage(advantage: str, sharding: str, base: Path, tmp_path: Path) -> None:
    entry = {"name": "ppo", "objective": "ppo", "advantage": advantage}
    suite = verl_suite(tmp_path, {"scale": {"sharding": sharding}}, rules=[entry])
    config = composed(rendered(suite.runs()[0], suite, base, tmp_path / "run"))
    validated(config)
    assert need_critic(config) == (advantage == "gae")
    if advantage == "gae":
        critic = omega_conf_to_dataclass(config.critic)
        assert critic.strategy == sharding and critic.optim.lr == pytest.approx(1e-5) and critic.cliprange_value == 0.2
        assert critic.model.path == str(base) and critic.loss_agg_mode == "token-mean" and config.algorithm.lam == 0.95


def test_values_arrive(base: Path, tmp_path: Path) -> None:
    """Table 3's columns in the objects that verl works with."""
    entry = {
        "name": "cppo",
        "objective": "cppo",
        "params": {"delta": 0.15},
        "divergence": BINARY_TV,
        "advantage": "dr_grpo",
        "aggregation": "seq-mean-token-sum-norm",
    }
    suite = verl_suite(tmp_path, rules=[entry])
    run = run_of(suite, "cppo", seed=1)
    config = composed(rendered(run, suite, base, tmp_path / "a run", report_to=("tensorboard",), attempt=3))
    actor = validated(config)
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, actor.rollout_n) == (64, 32, 8)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (1024, 8192)
    assert (actor.loss_agg_mode, actor.loss_scale_factor) == ("seq-mean-token-sum-norm", 8192)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.optim.weight_decay) == (1e-6, 5, 0.1)
    assert (list(actor.optim.betas), actor.optim.clip_grad) == ([0.9, 0.95], 0.5)
    assert (actor.engine.model_dtype, actor.engine.dtype, actor.engine.mixed_precision) == ("fp32", "bfloat16", None)
    assert (actor.ppo_micro_batch_size_per_gpu, actor.entropy_coeff, actor.use_kl_loss) == (2, 0, False)
    assert actor.policy_loss.rule.objective.params.delta == 0.15
    assert "hf_model" in actor.checkpoint.save_contents and "hf_model" not in actor.checkpoint.load_contents
    assert isinstance(actor.checkpoint, CheckpointConfig)
    assert config.algorithm.adv_estimator == "grpo" and not config.algorithm.norm_adv_by_std_in_grpo
    assert not config.algorithm.use_kl_in_reward and config.algorithm.rollout_correction.bypass_mode
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert (rollout.name, rollout.tensor_model_parallel_size, rollout.gpu_memory_utilization) == ("vllm", 4, 0.6)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.calculate_log_probs) == (1.0, 1, -1, True)
    assert rollout.logprobs_mode == "processed_logprobs" and rollout.dtype == "bfloat16"
    trainer = config.trainer
    assert (trainer.nnodes, trainer.n_gpus_per_node, trainer.total_training_steps) == (4, 8, 200)
    assert (trainer.save_freq, trainer.test_freq, trainer.val_before_train) == (10, -1, False)
    assert trainer.resume_mode == "auto" and trainer.default_local_dir == str(tmp_path / "a run" / "verl")
    assert list(trainer.logger) == ["console", "file", "tensorboard"]
    variables = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert Path(variables.VERL_FILE_LOGGER_PATH) == tmp_path / "a run" / "verl" / "log-3.jsonl"


def test_float32_reaches_fsdp(base: Path, tmp_path: Path) -> None:
    suite = verl_suite(tmp_path, {"scale": {"precision": "float32"}})
    actor = validated(composed(rendered(suite.runs()[0], suite, base, tmp_path / "run")))
    assert actor.engine.mixed_precision == {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def test_megatron_keys(base: Path, tmp_path: Path) -> None:
    suite = verl_suite(tmp_path, {"scale": {"sharding": "megatron", "expert_parallel": 8, "micro_rows": 4}})
    actor = validated(composed(rendered(suite.runs()[0], suite, base, tmp_path / "run")))
    engine = actor.engine
    assert (engine.tensor_model_parallel_size, engine.expert_model_parallel_size, engine.dtype) == (4, 8, "bfloat16")
    assert engine.override_transformer_config["recompute_granularity"] == "full"
    assert (actor.optim.lr_decay_style, actor.optim.lr_warmup_steps) == ("constant", 5)


def test_an_unknown_key_fails(base: Path, tmp_path: Path) -> None:
    """So the tests above show that every key exists."""
    suite = verl_suite(tmp_path)
    words = rendered(suite.runs()[0], suite, base, tmp_path / "run")
    for bogus in ("actor_rollout_ref.actor.optim.learning_rate=1", "trainer.saev_freq=1"):
        with pytest.raises(ConfigCompositionException, match="Could not override"):
            composed([*words, bogus])


@pytest.mark.parametrize("advantage", [a for a in verl_checks.VERL_ADVANTAGES if a != "gae"])
def test_advantages_are_ours(advantage: str) -> None:
    """The estimator that verl gets for each name computes our numbers, in ragged groups of mixed rewards."""
    tokens = random_tokens(3, batch=12, width=7)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0], dtype=torch.float64)
    mask = tokens.mask | (torch.arange(7) == 0)  # verl's code asks for a first token
    at_end = advantages.at_last_token(rewards, mask)
    found, _ = get_adv_estimator_fn(verl_checks.VERL_ADVANTAGES[advantage])(
        token_level_rewards=at_end,
        response_mask=mask.to(torch.float64),
        index=np.repeat(["a", "b", "c"], 4),
        norm_adv_by_std_in_grpo=advantage == "grpo",
        config=OmegaConf.create({"gamma": 1.0}),
    )
    expected, _ = advantages.estimator(advantage)(advantages.Outcomes(rewards, mask, 4))
    torch.testing.assert_close(found * mask, expected, atol=1e-6, rtol=1e-6)
    assert expected.abs().max() > 0


def test_gae_is_ours() -> None:
    tokens = random_tokens(4, batch=6, width=7)
    mask = tokens.mask
    values = torch.where(mask, tokens.logp.detach(), 0)
    rewards = advantages.at_last_token(torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64), mask)
    found, returns = get_adv_estimator_fn("gae")(rewards, values, mask.to(torch.float64), 0.99, 0.9)
    expected, expected_returns = advantages.generalised_advantages(rewards, values, mask, 0.99, 0.9)
    torch.testing.assert_close(found * mask, advantages.whiten(expected, mask), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(returns * mask, expected_returns, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prompt", ["chat", "base"])
def test_verls_data_set_reads_our_prompts_in_order(
    prompt: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainer loads them: its data set, sampler and collation, its tokenizer with its chat template."""
    changes = {"iterations": 3, "checkpoint_every": 1, "rollout": {"prompts": 4, "minibatch": 4}}
    suite = verl_suite(tmp_path, {**changes, "task": {"prompt": prompt}}, {"gpus": 4, "nodes": 1})
    run = run_of(suite, "cppo")
    folder = tmp_path / "run"
    (folder / "verl").mkdir(parents=True)
    verl_launch.write_prompts(run, PROBLEMS, folder / "verl" / "train.parquet")
    config = composed(rendered(run, suite, base, folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    data = create_rl_dataset(config.data.train_files, config.data, model.tokenizer, model.processor)
    assert len(data) == 12
    batch = collate_fn([data[i] for i in list(create_rl_sampler(config.data, data))[:4]])
    answers = [row["ground_truth"] for row in batch["reward_model"]]
    assert [int(a) for a in answers] == [int(m[0]["content"].split()[2]) + 1 for m in batch["raw_prompt"]]
    text = model.tokenizer.apply_chat_template(list(batch["raw_prompt"][0]), add_generation_prompt=True, tokenize=False)
    question = batch["raw_prompt"][0][0]["content"]
    assert text == (question if prompt == "base" else f"<user>{question}</user>")


def scored(config: Any, base: Path, response: str, truth: str) -> dict[str, Any]:
    """One response through verl's own reward manager."""

    class Text:
        """A tokenizer that decodes everything to `response`."""

        def decode(self, *_: Any, **__: Any) -> str:
            return response

    data = DataProto(
        TensorDict({"responses": torch.ones(1, 90).long(), "attention_mask": torch.ones(1, 95).long()}, batch_size=1),
        {
            "data_source": np.array(["dapo_math_17k"], dtype=object),
            "reward_model": np.array([{"style": "rule", "ground_truth": truth}], dtype=object),
            "extra_info": np.array([{"index": 0, "id": "abc"}], dtype=object),
        },
    )

    async def run() -> dict[str, Any]:
        manager = load_reward_manager(config, Text())
        return await manager.run_single(data)

    return asyncio.run(run())


def test_rewards_through_verls_manager(base: Path, tmp_path: Path) -> None:
    """Right and wrong by comparison, right by math-verify in the child process, and no verdict."""
    suite = verl_suite(tmp_path)
    config = composed(rendered(suite.runs()[0], suite, base, tmp_path / "run"))
    for response, truth, expected, unjudged in [
        (r"so \boxed{7}", "7", 1.0, 0.0),
        (r"so \boxed{8}", "7", 0.0, 0.0),
        ("7", "7", 0.0, 0.0),
        (r"so \boxed{\frac{14}{2}}", "7", 1.0, 0.0),
        (r"so \boxed{" + "7+" * 20_000 + "}", "7", 0.0, 1.0),
    ]:
        found = scored(config, base, response, truth)
        assert found["reward_score"] == expected, response
        assert found["reward_extra_info"]["unjudged"] == unjudged


def test_overlong_shaping_is_ours(base: Path, tmp_path: Path) -> None:
    """90 tokens of at most 100 with a buffer of 40: three quarters of the penalty."""
    suite = verl_suite(tmp_path, {"rollout": {"max_response_tokens": 100, "overlong_buffer": 40}})
    config = composed(rendered(suite.runs()[0], suite, base, tmp_path / "run"))
    found = scored(config, base, r"\boxed{7}", "7")
    assert float(found["reward_score"]) == 1 + overlong_penalty(90, 100, 40) == 0.25


def test_verls_file_logger_is_collected(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by verl's tracker as the trainer does: numpy numbers, NaN for a non-finite gradient."""
    plan = {"iterations": 2, "checkpoint_every": 1}
    suite = verl_suite(tmp_path, plan)
    run, folder = run_of(suite, "cppo"), tmp_path / "run"
    (folder / "verl").mkdir(parents=True)
    config = composed(rendered(run, suite, base, folder))
    variables = OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env.env_vars)
    assert isinstance(variables, dict)
    for name, value in variables.items():
        monkeypatch.setenv(str(name), value)
    log_two_iterations(config)
    verl_launch.collect(run, RunFolder(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [0.5, 0.75] and [row["mask_share"] for row in rows] == [0.25, 0.25]
    assert [row["grad_norm"] for row in rows] == [1.5, None]


def log_two_iterations(config: Any) -> None:
    """What verl's trainer logs in two steps, in part, by its own tracker."""
    trainer = config.trainer
    tracking = Tracking(trainer.project_name, trainer.experiment_name, list(trainer.logger))
    for step in (1, 2):
        data = {
            "critic/score/mean": np.float32(0.25 + 0.25 * step),
            "response_length/mean": 300.0,
            "response_length/max": 900.0,
            "response_length/clip_ratio": 0.01,
            "actor/loss": np.float64(-0.5),
            "actor/grad_norm": 1.5 if step == 1 else np.float64("nan"),
            "actor/cppo_bench/mask_share_sum": np.float64(10.0),
            "actor/cppo_bench/mask_share_count": 40.0,
            "timing_s/gen": 3.0,
            "timing_s/update_actor": 2.0,
            "timing_s/step": 6.0,
        }
        tracking.log(data, step=step)
    tracking.finish()


def test_weights_are_kept_by_verls_callback(base: Path, tmp_path: Path) -> None:
    """Made from the configuration and called with the arguments of verl's trainer."""
    suite = verl_suite(tmp_path)
    config = composed(rendered(suite.runs()[0], suite, base, tmp_path / "run"))
    callback = load_class_from_fqn(config.trainer.checkpoint_callback_class)(config=config)
    state = Path(config.trainer.default_local_dir) / "global_step_10"
    (state / "actor" / "huggingface").mkdir(parents=True)
    (state / "actor" / "huggingface" / "model.safetensors").write_text("weights")
    callback.on_save(trainer=None, global_step=10, checkpoint_dir=str(state), async_save=False)
    assert (tmp_path / "run" / "checkpoints" / "iteration-10" / "model.safetensors").read_text() == "weights"


def test_train_runs_verl_and_collects(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver with a stand-in for verl's trainer, which needs GPUs: it composes the command it gets, and logs and saves with
    verl's classes where that configuration says. The first attempt dies; the second continues."""
    plan = {"iterations": 2, "checkpoint_every": 2}
    suite = verl_suite(tmp_path, plan, {"gpus": 8, "nodes": 1})
    run, folder = run_of(suite, "cppo"), tmp_path / "run"
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        sys.path[:0] = {[p for p in sys.path if p]!r}
        import test_verl_launch as t
        config = t.composed(sys.argv[3:])
        t.validated(config)
        os.environ.update(config.ray_kwargs.ray_init.runtime_env.env_vars)
        t.log_two_iterations(config)
        first = Path({str(tmp_path)!r}) / "first"
        if not first.exists():
            first.touch()
            sys.exit(3)
        assert Path(config.data.train_files).exists()
        state = Path(config.trainer.default_local_dir) / "global_step_2"
        (state / "actor" / "huggingface").mkdir(parents=True)
        (state / "actor" / "huggingface" / "model.safetensors").write_text("weights")
        t.load_class_from_fqn(config.trainer.checkpoint_callback_class)(config=config).on_save(None, 2, str(state))
        """)
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {stand_in} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("CPPO_VERL_PYTHON", str(python))
    monkeypatch.setattr(verl_launch, "installed", lambda _: {"verl/verl": "0.9.1"})
    with pytest.raises(ValueError, match="verl ended with exit code 3, see its output; the same command continues"):
        verl_launch.train(run, suite.resources["moe"], base, PROBLEMS, folder)
    assert not (folder / "DONE").exists()
    verl_launch.train(run, suite.resources["moe"], base, PROBLEMS, folder)
    assert json.loads((folder / "DONE").read_text()) == {"iterations": 2, "collapsed_at": None}
    assert sorted(p.name for p in (folder / "verl").glob("log-*")) == ["log-0.jsonl", "log-1.jsonl"]
    assert (folder / "checkpoints" / "iteration-2" / "model.safetensors").exists()
    assert RunConfig.model_validate_json((folder / "config.json").read_text()) == run
    assert json.loads((folder / "provenance.json").read_text())["verl/verl"] == "0.9.1"
