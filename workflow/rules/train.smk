# Training. A run's folder is declared through its DONE file only: snakemake deletes the declared outputs of a failed job, and
# the checkpoints that the next attempt continues from must survive.
#
# Slurm sends SIGTERM to every process of a job. Only the trainer may act on it (it saves and ends): without the trap the
# shell would end at once, the job with it, and the trainer would be killed while it saves.


rule train:
    input:
        base=lambda w: f"runs/{suite().run(w.run).base.folder}/{DONE}",
        data=lambda w: f"runs/{suite().run(w.run).base.data}/train.jsonl",
    output:
        f"runs/train/{{rule}}/{{run}}/{DONE}",
    log:
        "runs/logs/train/{rule}-{run}.log",
    benchmark:
        "runs/benchmarks/train/{rule}-{run}.tsv"
    wildcard_constraints:
        rule="|".join(rule.name for rule in load_suite(SUITE_FILE).rules),
    conda:
        ENVIRONMENT
    # The next attempt continues this one, so it needs no more time, and a node has no more memory. One task per node
    # (tasks_per_gpu=0) starts the processes for all its GPUs. With `mpi` the job's shell runs on the first of several nodes
    # and reaches the others by srun. SIGTERM comes before the time limit, early enough for the iteration in progress to end.
    resources:
        gpu=lambda w: resources_of(w).nodes * resources_of(w).gpus or None,
        nodes=lambda w: resources_of(w).nodes,
        tasks=lambda w: resources_of(w).nodes,
        tasks_per_gpu=0,
        mpi=lambda w: "srun" if resources_of(w).nodes > 1 else None,
        cpus_per_task=lambda w: resources_of(w).cpus,
        mem_mb=lambda w: ceil(1000 * resources_of(w).memory_gb),
        runtime=lambda w: ceil(60 * resources_of(w).hours),
        slurm_extra=lambda w: f"--signal=TERM@{ceil(min(900, 360 * resources_of(w).hours))}"
        + (
            f" --gpus-per-node={resources_of(w).gpus}"
            if resources_of(w).nodes > 1
            else ""
        ),
        launcher=launcher,  # not a param: the number of processes does not change a run
    params:
        numerics=NUMERICS_VERSION,  # as a param, so that a run of another version is made again
        added="",  # what a file of baselines replaces
    shell:
        "trap '' TERM; {resources.launcher} cppo train --suite $CPPO_SUITE --run {wildcards.run} {params.added}"
        " --restart-outdated"
        " 2> >(tee {log} >&2)"
