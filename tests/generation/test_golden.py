"""Token ids of the original code, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("cross", ["auto", "absorbed", "projected"])
@pytest.mark.parametrize("name", ["beam3", "greedy", "beam3_rep", "beam5_long"])
def test_captions(reference, name: str, cross: str) -> None:
    model, golden, meta = reference("caption")
    options = meta["generate"][name]["args"]
    out = model.generate(golden["image"], prompt_ids=golden["prompt_ids"], cross=cross, **options)
    torch.testing.assert_close(out.sequences, golden[f"out.{name}.ids"], rtol=0, atol=0)


def test_nucleus(reference) -> None:
    model, golden, meta = reference("caption")
    options = meta["generate"]["nucleus"]["args"]
    draws, probs = golden["out.nucleus.draws"], golden["out.nucleus.probs_first5"]
    steps = []

    def replay(p: Tensor, rows: Tensor, step: int) -> Tensor:
        if step < len(probs):
            atol = 4e-6 if p.is_cuda else 2e-6  # sums in another order than the recorded CPU's
            torch.testing.assert_close(p, probs[step][rows], rtol=0, atol=atol)
        steps.append(step)
        return draws[rows, step]

    out = model.generate(
        golden["image"],
        prompt_ids=golden["prompt_ids"],
        method="nucleus",
        draw=replay,
        **options,
    )
    torch.testing.assert_close(out.sequences, golden["out.nucleus.ids"], rtol=0, atol=0)
    assert len(steps) > len(probs)


def test_answers(reference) -> None:
    model, golden, _ = reference("vqa")
    question = golden["rank.question.input_ids"], golden["rank.question.attention_mask"]
    out = model.generate(golden["image"], *question, attend_padding=True)
    torch.testing.assert_close(out.sequences, golden["out.generate.ids"], rtol=0, atol=0)


def test_answers_do_not_depend_on_the_batch(reference) -> None:
    """The original's fault, which attend_padding=True reproduces and the default does not."""
    model, golden, _ = reference("vqa")
    ids, mask = golden["rank.question.input_ids"], golden["rank.question.attention_mask"]
    assert mask.sum(1).unique().numel() > 1
    sep = model.text_config.sep_token_id
    batched, padded = (
        model.generate(golden["image"], ids, mask, attend_padding=p) for p in (False, True)
    )
    alone, alone_padded = [], []
    for i, length in enumerate(mask.sum(1).tolist()):
        one = golden["image"][i : i + 1], ids[i : i + 1, :length], mask[i : i + 1, :length]
        alone += model.generate(*one).new_tokens(sep_token_id=sep)
        alone_padded += model.generate(*one, attend_padding=True).new_tokens(sep_token_id=sep)
    assert batched.new_tokens(sep_token_id=sep) == alone
    assert alone == alone_padded
    assert padded.new_tokens(sep_token_id=sep) != alone_padded
