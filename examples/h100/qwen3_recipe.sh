# Qwen3-1.7B learns from Qwen3-8B by TrOPD, with the TrOPD paper's steps, batch, optimizer and method (arXiv 2606.01249).
# This pair of models is not one of the paper's; those are in examples/paper.
# Sourced by one_node.sh and two_nodes.sh, which add PARALLEL_ARGS and start torchrun.
#
# NOT RUN ON GPUS YET.  tests/test_examples.py checks every flag below with the parser and the layouts
# with the sizes of both models; no number of speed or quality is known for this recipe.
#
# Environment variables that must be set, with the same paths on every node:
#   STUDENT   Hugging Face directory of Qwen3-1.7B (config, tokenizer, safetensors)
#   TEACHER   Hugging Face directory of Qwen3-8B
#   PROMPTS   data with the columns prompt and response (a response of the teacher): files, directories or a data set of
#             the Hugging Face Hub, docs/data.md
#   RUN_DIR   directory of the run; on a file system that all nodes share
# and, where needed:
#   EVAL_DATA      held-out prompts with the column answer
#   SGLANG_PYTHON  interpreter of SGLang's environment, if it is not the trainer's
#   ENGINE_URLS    SGLang servers that run already, instead of eight started on the first node

: "${STUDENT:?set it to the Hugging Face directory of the student}"
: "${TEACHER:?set it to the Hugging Face directory of the teacher}"
: "${PROMPTS:?set it to data with prompts and teacher responses}"
: "${RUN_DIR:?set it to a directory for everything the run writes}"

export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron: order communication before computation under TP
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

MODEL_ARGS=(
    --hf-checkpoint "${STUDENT}"
    --teacher-hf-checkpoint "${TEACHER}"
    --bf16
    --recompute-granularity full # saves memory; remove it where activations fit
)

DATA_ARGS=(
    --prompt-data "${PROMPTS}"
    --apply-chat-template
    --max-prompt-length 2048
    --max-response-length 8096 # the paper's number; the teacher prefix counts
    --max-tokens-per-microbatch 16384
)
if [[ -n "${EVAL_DATA:-}" ]]; then
    DATA_ARGS+=(--eval-data "${EVAL_DATA}" --eval-interval 50 --eval-prompts 128)
fi

ROLLOUT_ARGS=(
    --rollout-batch-size 128
    --n-samples-per-prompt 4
    --rollout-engine sglang
    --sglang-python "${SGLANG_PYTHON:-$(command -v python)}" # an environment with SGLang; it may be the trainer's
    --sglang-mem-fraction-static 0.3 # of a GPU: 3.4 GB of weights, the rest KV cache, 0.11 MB a token
)
if [[ -n "${ENGINE_URLS:-}" ]]; then # servers that run already, started with the flags of docs/sglang.md
    # shellcheck disable=SC2206
    ROLLOUT_ARGS+=(--rollout-engine-urls ${ENGINE_URLS})
else # one server on each GPU of the first node, beside the trainer
    ROLLOUT_ARGS+=(--rollout-num-engines 8)
fi

OBJECTIVE_ARGS=(
    --objective tropd
    --top-k 64
    --gate bernoulli
    --fkl-support raw
    --outlier-coef 1.0
    --guidance ratio
    --guidance-schedule half-cosine
    --guidance-steps 0 # 0: over all of --train-iters
    --guidance-beta 0.001
)

OPTIMIZER_ARGS=(
    --train-iters 200
    --lr 5e-6
    --lr-decay-style constant
    --adam-beta1 0.9 # the paper names no betas: veRL's defaults
    --adam-beta2 0.999
    --weight-decay 0.1
    --clip-grad 1.0
    --seed 1234
)

CHECKPOINT_ARGS=(
    --run-dir "${RUN_DIR}"
    --save-interval 20
    --rollout-log-interval 10
)
