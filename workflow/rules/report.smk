# Tables from run folders, and the paper's figures from tables.


rule collect:
    input:
        lambda w: [
            f"runs/{run.folder}/{SCORES}"
            for run in (*suite().bases(), *suite().runs())
        ],
    output:
        expand(
            "runs/{suite}/{table}.{kind}",
            suite=SUITE,
            table=TABLES,
            kind=["csv", "parquet"],
        ),
        f"runs/{SUITE}/suite.json",
        f"runs/{SUITE}/configs.json",
    log:
        f"runs/logs/collect-{SUITE}.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        added=" ".join(map(rule_argument, ADDED_RULES)),
        numerics=NUMERICS_VERSION,
    shell:
        "python -m cppo collect --suite $CPPO_SUITE {params.added} 2> >(tee {log} >&2)"


# There is one rule for each item of each folder of tables: the running suite's folder is under runs/, the published ones are under
# results/. No rule makes a published table, so drawing the figures again never trains.
for FOLDER, RESOLVED in table_folders().items():
    for ITEM in available(RESOLVED):

        rule:
            name:
                f"{ITEM}_{slug(FOLDER)}"
            input:
                tables=expand("{folder}/{table}.csv", folder=FOLDER, table=TABLES),
                suite=f"{FOLDER}/suite.json",
                configs=f"{FOLDER}/configs.json",
            output:
                [f"{FOLDER}/figures/{file}" for file in files(RESOLVED, ITEM)],
            log:
                f"runs/logs/figures/{slug(FOLDER)}-{ITEM}.log",
            localrule: True
            conda:
                ENVIRONMENT
            params:
                item=ITEM,
                folder=subpath(input.suite, parent=True),
            shell:
                "python paper_figures/{params.item}.py {params.folder} 2> >(tee {log} >&2)"


rule figures:
    input:
        drawn(f"runs/{SUITE}"),


rule paper_figures:
    input:
        [drawn(folder) for folder in table_folders() if folder.startswith("results/")],
