# shellcheck shell=bash
# Sourced by train.sh and row.sbatch: reads their words and writes OUT/recipe.yaml, a file for --config.
#
#   --setting NAME   a file of settings/
#   --row NAME       a row of rows.yaml; sft-student, sft-teacher and grpo-teacher have none
#   --out DIR        recipe.yaml and run/ go there, on a file system that all nodes share
#   --smoke          or SMOKE=1: the same on CPUs with tiny models, two steps on two ranks
# All words after these are flags of the trainer, which win over the recipe's.
#
# Environment variables:
#   PROMPTS          data to train on, README.md; not needed for a smoke run
#   STUDENT TEACHER  models instead of the setting's; directories, or names on the Hugging Face Hub
#   EVAL_DATA        held-out prompts with answers, graded before and after the training
#   PYTHON           the trainer's interpreter; default: REPO/.venv/bin/python
#   SGLANG_PYTHON    interpreter of SGLang's environment; default: PYTHON
#   SMALL_WORLD      models and prompts of a smoke run, made where they are missing; default: REPO/runs/small_world_0

REPO="${REPO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
PYTHON="${PYTHON:-${REPO}/.venv/bin/python}"
SETTING="" ROW="" OUT="" SMOKE="${SMOKE:-}"
while (($#)); do
    case "$1" in
        --setting | --row | --out)
            if (($# < 2)); then
                echo "$1 needs a value; examples/paper/common.sh says what it takes" >&2
                exit 2
            fi
            name="${1#--}"
            printf -v "${name^^}" "%s" "$2"
            shift 2
            ;;
        --smoke) SMOKE=1 && shift ;;
        *) break ;;
    esac
done
if [[ -z "${OUT}" ]]; then
    echo "--out is missing: name a directory for the row" >&2
    exit 2
fi
if [[ -z "${SMOKE}${PROMPTS:-}" ]]; then
    echo "PROMPTS is not set: set it to the data of examples/paper/README.md, or give --smoke before the trainer's flags" >&2
    exit 2
fi

RECIPE_ARGS=(--setting "${SETTING}" --row "${ROW}" --save "${OUT}/recipe.yaml")
if [[ -n "${SMOKE}" ]]; then
    SMALL_WORLD="${SMALL_WORLD:-${REPO}/runs/small_world_0}"
    if [[ ! -f "${SMALL_WORLD}/train.jsonl" ]]; then
        "${PYTHON}" "${REPO}/tools/make_small_world.py" --save "${SMALL_WORLD}"
    fi
    RECIPE_ARGS+=(--small-world "${SMALL_WORLD}")
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore # they need no GPU
else
    RECIPE_ARGS+=(
        --prompt-data "${PROMPTS}" --student "${STUDENT:-}" --teacher "${TEACHER:-}"
        --eval-data "${EVAL_DATA:-}" --sglang-python "${SGLANG_PYTHON:-${PYTHON}}"
    )
fi
"${PYTHON}" "${REPO}/tools/paper_recipe.py" "${RECIPE_ARGS[@]}"
