"""One suite through data, base models, training, evaluation, tables and figures.

snakemake --cores all                           the default suite, config/mini.yaml
snakemake --cores all --config suite=smoke      another one, by its name in config/ or by its file
snakemake --cores all -F paper_figures          redraw every published figure from results/, training nothing
"""

from snakemake.utils import min_version

min_version("9.27")


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"


for path in BASELINE_FILES:

    include: path


include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        rules.figures.input,
