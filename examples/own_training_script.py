"""The TrOPD loss in a training script of your own: the head, the objective and the gate as a library.

    torchrun --nproc-per-node 2 examples/own_training_script.py

The output tables of student and teacher are split over tensor-parallel ranks, as Megatron's output layer is; the loss
and the gradients are the same on any number of ranks.  In a Megatron script, ``hidden`` is the output of the last
pipeline stage, ``table`` is ``model.output_layer.weight``, and everything from ``scores`` on is the loss function that
``forward_step`` returns.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which its functions would keep as a default

import megatron_tropd as tropd

NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 24, 101, 32


def main() -> None:
    """One loss, with its gradients, of a batch that is made up."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    rows = -(-VOCAB_SIZE // ranks)
    shard = tropd.VocabShard(vocab_size=VOCAB_SIZE, rows_per_rank=rows, group=dist.group.WORLD)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def my_rows(table: torch.Tensor) -> torch.Tensor:  # the last rank's rows beyond the vocabulary are padding
        return torch.cat([table, table.new_zeros(rows * ranks - len(table), HIDDEN_SIZE)])[rank * rows :][:rows].clone()

    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = draw(NUM_TOKENS, 1, HIDDEN_SIZE).requires_grad_(), draw(NUM_TOKENS, HIDDEN_SIZE)
    table = my_rows(draw(VOCAB_SIZE, HIDDEN_SIZE) / 8).requires_grad_()
    teacher_table = my_rows(draw(VOCAB_SIZE, HIDDEN_SIZE) / 8)
    label_T = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)

    objective = tropd.make_objective("tropd", tropd.ObjectiveSettings(top_k=8))
    scores = tropd.teacher_scores(teacher_hidden, teacher_table, label_T, shard, top_k=objective.needs.top_k)
    coins = tropd.uniform(tropd.key(0, tropd.Stream.GATE, step=0), torch.zeros_like(label_T), torch.arange(NUM_TOKENS))
    tokens = replace(
        tropd.blank_streams(NUM_TOKENS, objective.needs),
        label_T=label_T,
        region_T=torch.full_like(label_T, tropd.Region.ON_POLICY, dtype=torch.uint8),
        uniform_T=coins,
        teacher_logprob_T=scores.logprob,
        teacher_topk_ids_TK=scores.topk_ids.long(),
        teacher_topk_logprob_TK=scores.topk_logprobs,
    )
    out = tropd.head_loss(hidden, table, tokens, shard, objective, tropd.StepContext(), sequence_parallel=False)
    (out.loss / out.denominator).backward()

    trusted = out.metrics["tropd/trusted_frac"]
    norm = dist_norm(table.grad)
    if rank == 0:
        print(f"loss {out.loss / out.denominator:.6f} trusted {trusted.total / trusted.count:.4f} gradients {norm:.6f}")


def dist_norm(shard_of_gradient: torch.Tensor) -> float:
    """Norm of a gradient of which every rank holds a part."""
    square = shard_of_gradient.double().square().sum()
    dist.all_reduce(square)
    return float(square.sqrt())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()  # nothing holds the group any more: its threads end here, before Python does
