"""A run from its first iteration, or from where it was left, to its end."""

from contextlib import closing
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from cppo import advantages
from cppo.models.load import load_pretrained, load_tokenizer
from cppo.results.provenance import provenance
from cppo.results.run_folder import RunFolder, Status
from cppo.rewards import Judge
from cppo.rollout.start import start_engine
from cppo.rollout.types import EngineDied
from cppo.suite.config import RunConfig
from cppo.system.interrupts import Interrupted, Terminated, enough_memory
from cppo.tasks.types import Problem
from cppo.training.critic import ValueModel
from cppo.training.distributed import make_accelerator, start_trackers
from cppo.training.train import Trainer


def train(
    run: RunConfig, base: Path, problems: tuple[Problem, ...], path: Path, trackers: tuple[str, ...] = ()
) -> None:
    """Train `run` from the base model's checkpoint folder `base`, or continue it, until its folder `path` says DONE.

    Called in each of the processes that a launcher started, it trains in all of them together. trackers: names of
    `Suite.report_to`. SIGTERM (which Slurm sends before a time limit) ends it after the current iteration with its state
    saved, by `Interrupted`. Raises ValueError when the folder's saved state was made by another numerics version or with
    other packages.
    """
    folder, setting = RunFolder(path), run.setting
    accelerator = make_accelerator(setting.scale, trackers, folder.trackers)
    accelerator.wait_for_everyone()  # the main process may have had to move an outdated run aside
    if folder.done:
        return
    judge = Judge()
    judge.start()  # before anything is written or computed: without it some answers cannot be judged
    if accelerator.is_main_process:
        folder.begin(run, provenance(), begun=folder.state.exists())
    accelerator.wait_for_everyone()
    start_trackers(accelerator, run)
    needs_critic = advantages.estimator(run.rule.advantage).critic
    critic = ValueModel(_trainable(run, base)) if needs_critic else None
    title, quiet = f"{run.rule_name} seed {run.seed}", not accelerator.is_main_process
    bar = tqdm(total=setting.iterations, desc=title, unit="it", mininterval=5, disable=quiet)
    policy, tokenizer = _trainable(run, base), load_tokenizer(base)
    collapsed = False
    with judge, Terminated() as terminated, closing(start_engine(setting.scale, base, policy)) as engine, bar:
        trainer = Trainer(run, folder, problems, policy, tokenizer, critic, judge, accelerator, engine)
        trainer.resume()
        bar.update(trainer.iteration)
        while trainer.iteration < setting.iterations:
            try:
                with enough_memory(path, trainer.iteration + 1):
                    trainer.step()
            except EngineDied:
                if not terminated:
                    raise
                # Slurm sends SIGTERM to every process of a job, so to an engine's too.
                raise Interrupted(
                    f"{path}: stopped by SIGTERM in iteration {trainer.iteration}, before its updates"
                ) from None
            bar.update()
            if judge.unjudged:
                bar.set_postfix(unjudged=judge.unjudged, refresh=False)
            collapsed = trainer.nonfinite_in_a_row >= setting.collapse_after
            if collapsed:
                break
            if terminated:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()  # any rank's: the signal may reach one later than another
            if trainer.iteration % setting.checkpoint_every == 0 or stop:
                trainer.save()
            if stop and trainer.iteration < setting.iterations:
                raise Interrupted(f"{path}: stopped by SIGTERM after iteration {trainer.iteration}, which is saved")
    if accelerator.is_main_process:
        folder.finish(Status(trainer.iteration, trainer.iteration if collapsed else None))
    accelerator.end_training()


def _trainable(run: RunConfig, base: Path) -> PreTrainedModel:
    """The base model, prepared for training as the setting says."""
    model = load_pretrained(base)
    if run.setting.scale is not None and run.setting.scale.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode only; the models have no dropout
    return model
