"""What training costs on 1 to 256 GPUs, on paper: `python -m benchmarks.scaling --write`.

Per step and GPU: arithmetic by formula (`blipfast.train.flops`), and the bytes that each collective
moves, which `tests/benchmarks/test_scaling.py` holds against real processes. Ring algorithms: an
all-reduce of n bytes over W ranks moves 2 (W - 1) / W n, an all-gather or reduce-scatter half.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from blipfast.models.config import BlipConfig, blip_config
from blipfast.train.config import ObjectiveConfig
from blipfast.train.flops import sample_flops

RESULTS = Path(__file__).parent / "results"
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. peak: bf16 FLOP/s of one GPU; mfu: share of it that a step alone reaches.
    nvlink, network: bytes a second of one GPU within its node, and of its share of the network."""

    name: str = "H100 SXM, 8 a node, 400 Gb/s for each GPU"
    per_node: int = 8
    peak: float = 989e12
    mfu: float = 0.4
    nvlink: float = 350e9
    network: float = 40e9
    latency: float = 25e-6


def parameters(config: BlipConfig) -> tuple[int, int]:
    """Trained parameters of pre-training, and those of the image encoder's blocks among them."""
    v, t = config.vision, config.text
    hidden = int(v.hidden_size * v.mlp_ratio)
    block = v.hidden_size * (4 * v.hidden_size + 2 * hidden + 9) + hidden
    patch = 3 * v.patch_size**2 * v.hidden_size + v.hidden_size
    image = v.num_layers * block + patch + (v.num_tokens + 3) * v.hidden_size
    d = t.hidden_size
    words = (t.vocab_size + t.max_positions + 2) * d
    own = 4 * d * d + 6 * d
    cross = 2 * d * d + 2 * v.hidden_size * d + 6 * d
    ffn = 2 * d * t.intermediate_size + t.intermediate_size + 3 * d
    text = words + t.num_layers * (2 * own + cross + ffn)
    head = d * d + 3 * d + t.vocab_size
    itc = config.embed_dim * (v.hidden_size + d + 2) + 1
    return image + text + head + itc + 2 * d + 2, v.num_layers * block


def collectives(config: BlipConfig, batch: int, ranks: int, tokens: int) -> dict[str, int]:
    """Bytes that one rank hands to each kind of collective in a step of pre-training under DDP.

    batch: pairs of one rank. tokens: length that texts are padded to.
    """
    d, width = config.embed_dim, config.vision.hidden_size
    trained = parameters(config)[0]
    if ranks == 1:
        return {}
    # On average so many of a rank's images are drawn by texts of other ranks.
    foreign = batch * (ranks - 1) / ranks
    image = config.vision.num_tokens * width * 4
    return {
        "gradients (all-reduce)": 4 * trained,
        "momentum features (all-gather)": 2 * batch * d * 4,
        "drawn numbers (all-gather)": batch * 8,
        "texts (all-gather)": 2 * batch * tokens * 8,
        "drawn images and their gradients (all-to-all)": int(2 * foreign * image),
        "counts and losses (all-reduce)": 8 + 2 * 4 + 7 * 4,
    }


def step_seconds(
    config: BlipConfig, batch: int, gpus: int, cluster: Cluster, tokens: int = 14
) -> tuple[float, float]:
    """Seconds of a step's arithmetic, and of what its communication adds to it."""
    objective = ObjectiveConfig()
    flops = sample_flops(config, "pretrain", objective, length=tokens, batch=batch * gpus) * batch
    compute = flops / (cluster.peak * cluster.mfu)
    if gpus == 1:
        return compute, 0.0
    alone = gpus <= cluster.per_node
    # As many rings run as a node has network cards, each with its part of the bytes, so that one
    # card carries only that part; what goes from GPU to GPU has one card to itself.
    ring = min(cluster.nvlink, cluster.network * cluster.per_node)
    speed, direct = (cluster.nvlink,) * 2 if alone else (ring, cluster.network)
    share = (gpus - 1) / gpus
    moved = collectives(config, batch, gpus, tokens)
    gradients = 2 * share * moved.pop("gradients (all-reduce)") / speed
    # DDP sends a bucket as soon as it is full: all but the last hide behind the backward pass,
    # which is half of the step, the twin's forward and the forward pass being the rest.
    exposed = max(gradients - 0.5 * compute, gradients / 20)
    others = sum(
        (gpus - 1) * size / speed if "gather" in name else size / direct
        for name, size in moved.items()
    )
    return compute, exposed + others + 12 * cluster.latency


def table(cluster: Cluster) -> list[str]:
    lines = [
        "| model | GPUs | pairs a step | arithmetic | communication | pairs/s | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, preset, batch in (("ViT-B", "blip_base", 90), ("ViT-L", "blip_large", 75)):
        config = blip_config(preset)
        for gpus in GPUS:
            compute, added = step_seconds(config, batch, gpus, cluster)
            rate = batch * gpus / (compute + added)
            lines.append(
                f"| {name} | {gpus} | {batch * gpus:,} | {1e3 * compute:.1f} ms | "
                f"{1e3 * added:.1f} ms | {rate:,.0f} | {compute / (compute + added):.1%} |"
            )
    return lines


def page(cluster: Cluster) -> str:
    moved = collectives(blip_config("blip_base"), 90, 32, 30)
    rows = [f"| {name} | {size / 2**20:,.2f} MiB |" for name, size in moved.items()]
    return "\n".join(
        [
            "# Scaling of pre-training, on paper",
            "",
            f"`python -m benchmarks.scaling --write`. {cluster.name}; {cluster.mfu:.0%} of the "
            "peak in bf16 assumed for the arithmetic, "
            f"{cluster.nvlink / 1e9:.0f} and {cluster.network / 1e9:.0f} GB/s within and between "
            "nodes, gradients in float32, all-reduced while the backward pass runs. A model, not a "
            "measurement: only the bytes are checked, in real processes on a CPU.",
            "",
            "Handed to collectives by each rank in a step of ViT-B, 90 pairs, 32 ranks:",
            "",
            "| what | size |",
            "|---|---|",
            *rows,
            "",
            *table(cluster),
            "",
            "![efficiency](scaling.svg)",
            "",
        ]
    )


def plot(cluster: Cluster, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for name, preset, batch in (("ViT-B", "blip_base", 90), ("ViT-L", "blip_large", 75)):
        config = blip_config(preset)
        seconds = [step_seconds(config, batch, gpus, cluster) for gpus in GPUS]
        axes.plot(GPUS, [100 * c / (c + a) for c, a in seconds], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="GPUs", ylabel="efficiency, %", ylim=(0, 105), title="On paper")
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew results/scaling.*")
    text = page(Cluster())
    print(text)
    if parser.parse_args().write:
        (RESULTS / "scaling.md").write_text(text)
        plot(Cluster(), RESULTS / "scaling.svg")


if __name__ == "__main__":
    main()
