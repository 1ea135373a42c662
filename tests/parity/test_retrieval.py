"""Retrieval fine-tuning, scoring and re-ranking equal the original's, on one rank and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blipfast.checkpoints import original_state_dict
from blipfast.evaluation.retrieval import recall_metrics, score_retrieval
from blipfast.models.streams import run_streams


def test_step_and_state(golden, checkpoint, load, check) -> None:
    g = golden("retrieval")
    model = load(checkpoint("retrieval"), train_state=True, negatives_from_all_ranks=False)
    out = model(
        g["image"],
        *g.text(),
        image_ids=g["idx"],
        alpha=g.meta["alpha"],
        step=0,
        negatives=g.negatives(),
        update_state=True,
    )
    check.loss(out.loss_itc, g["out.loss_ita"])
    check.loss(out.loss_itm, g["out.loss_itm"])
    check.features(out.itm_logits, g["out.itm_logits"])
    check.features(model.queue.image_queue.T, g["out.image_queue"])
    check.features(model.queue.text_queue.T, g["out.text_queue"])
    assert torch.equal(model.queue.id_queue, g["out.idx_queue"][0])
    assert model.queue.ptr.item() == g["out.ptr_queue"].item()
    state = original_state_dict(model)
    names = {n for n in g.meta["momentum_after"] if ".crossattention." not in n}
    assert names == {name for name in state if "_m." in name}
    for name in names:
        norm = g.meta["momentum_after"][name]["norm"]
        assert state[name].double().norm().item() == pytest.approx(norm, rel=1e-6)
    out.loss.backward()
    check.gradients(model, g)
    with torch.no_grad():
        embeds, text = model.encode_image(g["image"]), g.packed()
        check.features(embeds, g["after.image_embeds"])
        check.features(model.image_features(embeds), g["after.image_feat"])
        check.features(model.text_features(text), g["after.text_feat"])
        check.features(model.encode_text(text), text.packing.unpad(g["after.text_hidden"]))
        image_feat_m, text_feat_m = model.twin.features(g["image"], text)
        check.features(image_feat_m, g["after.image_feat_m"])
        check.features(text_feat_m, g["after.text_feat_m"])


def test_negatives_are_drawn_where_the_original_could(golden, checkpoint, load) -> None:
    g = golden("retrieval")
    model = load(checkpoint("retrieval"), train_state=True)
    weights = g["out.neg_weights"]
    for step in range(8):
        with torch.no_grad():
            out = model(
                g["image"], *g.text(), image_ids=g["idx"], alpha=0.0, step=step, update_state=False
            )
        drawn = torch.cat([out.negatives.image_index, out.negatives.text_index])
        assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_scorer_that_keeps_cls(golden, checkpoint, load, check) -> None:
    """The original's demo class leaves [CLS] where training put [ENC]."""
    g = golden("itm")
    model = load(checkpoint("retrieval"), "retrieval")
    text = g.packed()
    with torch.no_grad():
        embeds = model.encode_image(g["image"])
        stream = model.text_encoder.stream(
            text.input_ids, text.packing, kv_index=range(4), first_only=True
        )
        logits = model.itm_head(run_streams([stream], model.image_states(embeds))[0])
        check.features(logits, g["out.itm_logits"])
        similarity = model.image_features(embeds) @ model.text_features(text).T
    check.features(similarity, g["out.itc_sim"])


def test_two_stage_evaluation(golden, checkpoint, load, check) -> None:
    g = golden("retrieval_eval")
    model = load(checkpoint("retrieval"), "retrieval")
    text = g.packed()
    with torch.no_grad():
        embeds = model.encode_image(g["image"])
        scores = score_retrieval(
            model,
            embeds,
            model.image_features(embeds),
            text,
            model.text_features(text),
            k=g.meta["k_test"],
            images_per_block=3,
        )
    check.features(scores.itc, g["out.sims"])
    check.features(scores.image_to_text, g["out.score_i2t"])
    check.features(scores.text_to_image.T, g["out.score_t2i"])
    texts_of_image = [g.meta["img2txt"][str(i)] for i in range(4)]
    recall = recall_metrics(scores.image_to_text, scores.text_to_image, texts_of_image)
    expected = g.meta["metrics"]
    assert recall.tr_r1 == pytest.approx(expected["txt_r1"])
    assert recall.ir_r5 == pytest.approx(expected["img_r5"])
    assert recall.mean == pytest.approx(expected["r_mean"])


def test_two_ranks(golden, check, device, tmp_path: Path) -> None:
    """Two processes: negatives from all ranks, gradients summed through the gathered images."""
    worker = Path(__file__).with_name("two_ranks_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log
    for rank in (0, 1):
        g = golden("retrieval_two_ranks", f"golden_rank{rank}")
        got = load_file(tmp_path / f"rank{rank}.safetensors")
        got = {name: tensor.to(device) for name, tensor in got.items()}
        check.loss(got["loss_itc"], g["out.loss_ita"])
        check.loss(got["loss_itm"], g["out.loss_itm"])
        check.features(got["itm_logits"], g["out.itm_logits"])
        check.features(got["image_queue"].T, g["out.image_queue"])
        check.features(got["text_queue"].T, g["out.text_queue"])
        assert torch.equal(got["id_queue"], g["out.idx_queue"][0])
        assert got["ptr"].item() == g["out.ptr_queue"].item()
        grads = {n.removeprefix("grad."): t for n, t in got.items() if n.startswith("grad.")}
        check.gradient_tensors(grads, g, g.meta["grad_norms_before_averaging"])
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == {"world_size": 2}
