"""One rank of `test_retrieval.test_two_ranks`: `two_ranks_worker.py RANK FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from blipfast import load_model
from blipfast.checkpoints.mapping import to_foreign
from blipfast.checkpoints.save import layout_of
from blipfast.objectives.itm import Negatives
from blipfast.train.ranks import leave_group

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    inputs = load_file(REFERENCE / "retrieval_two_ranks" / "golden_rank0.safetensors")
    golden = load_file(REFERENCE / "retrieval_two_ranks" / f"golden_rank{rank}.safetensors")
    meta = json.loads((REFERENCE / "retrieval_two_ranks" / f"golden_rank{rank}.json").read_text())
    model = load_model(REFERENCE / "retrieval" / "checkpoint.pth", train_state=True)
    mine = slice(2 * rank, 2 * rank + 2)
    out = model(
        inputs["image"][mine],
        inputs["text.input_ids"][mine],
        inputs["text.attention_mask"][mine],
        image_ids=inputs["idx"][mine],
        alpha=meta["alpha"],
        step=0,
        negatives=Negatives(*golden["out.neg_draws"].chunk(2)),
        update_state=True,
    )
    out.loss.backward()
    state = model.state_dict(keep_vars=True)
    grads = {name: t.grad for name, t in state.items() if t.grad is not None}
    named = to_foreign(grads, layout_of("original", model))
    result = {f"grad.{name}": grad.contiguous() for name, grad in named.items()}
    result |= {name: loss.detach() for name, loss in (("loss_itc", out.loss_itc),)}
    result |= {"loss_itm": out.loss_itm.detach(), "itm_logits": out.itm_logits.detach()}
    result |= {name: tensor.contiguous() for name, tensor in model.queue.state_dict().items()}
    save_file({n: t.clone() for n, t in result.items()}, folder / f"rank{rank}.safetensors")
    world = {"world_size": dist.get_world_size()}
    (folder / f"rank{rank}.json").write_text(json.dumps(world))
    dist.barrier()
    leave_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
