# Training. A run directory is declared through its DONE file: snakemake deletes a failed job's declared outputs, and the
# checkpoints that the next attempt continues from must survive.


rule train:
    input:
        base=lambda w: f"runs/{find_run(loaded(), w.run).base.folder}/DONE",
        data=lambda w: f"runs/{find_run(loaded(), w.run).base.data}/train.jsonl",
    output:
        "runs/train/{label}/{run}/DONE",
    log:
        "runs/logs/train/{label}-{run}.log",
    benchmark:
        "runs/benchmarks/train/{label}-{run}.tsv"
    wildcard_constraints:
        label="|".join(entry.name for entry in load_suite(SUITE_FILE).objectives),
    conda:
        ENVIRONMENT
    params:
        baseline="",
    shell:
        "python -m cppo train --suite $CPPO_SUITE --run {wildcards.run} {params.baseline} 2> >(tee {log} >&2)"
