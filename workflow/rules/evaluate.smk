# Scores: lm-eval over all checkpoints of a run, or over a base model.


rule evaluate:
    input:
        "runs/train/{label}/{run}/DONE",
    output:
        "runs/train/{label}/{run}/scores.csv",
    log:
        "runs/logs/evaluate/{label}-{run}.log",
    benchmark:
        "runs/benchmarks/evaluate/{label}-{run}.tsv"
    conda:
        ENVIRONMENT
    resources:
        gpu=lambda w: share(w).gpus or None,
        cpus_per_task=lambda w: share(w).cpus,
        mem_mb=lambda w, attempt: ceil(1000 * share(w).memory_gb) * attempt,
        runtime=lambda w, attempt: ceil(60 * share(w).evaluate_hours) * attempt,
    shell:
        "python -m cppo evaluate $(dirname {input}) 2> >(tee {log} >&2)"


rule evaluate_base:
    input:
        "runs/base/{setting}/{base}/DONE",
    output:
        "runs/base/{setting}/{base}/scores.csv",
    log:
        "runs/logs/evaluate/base-{setting}-{base}.log",
    benchmark:
        "runs/benchmarks/evaluate/base-{setting}-{base}.tsv"
    conda:
        ENVIRONMENT
    resources:
        gpu=lambda w: share(w).gpus or None,
        cpus_per_task=lambda w: share(w).cpus,
        mem_mb=lambda w, attempt: ceil(1000 * share(w).memory_gb) * attempt,
        runtime=lambda w, attempt: ceil(60 * share(w).evaluate_hours) * attempt,
    shell:
        "python -m cppo evaluate $(dirname {input}) 2> >(tee {log} >&2)"
