"""One table of names, read in both directions: ours on the left, a foreign format's on the right.

`layout("original", …)` lists the original BLIP's names, `layout("hf", …)` those of transformers'
BLIP classes, `layout("bert", …)` those of a BERT checkpoint. `to_ours` and `to_foreign` apply it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blipfast.errors import CheckpointError

Kind = Literal["original", "hf", "bert"]
# How foreign tensors become ours: "cat" joins them along the first dimension, "copies" are several
# names of one tensor, "transpose" swaps two dimensions, "flat" drops dimensions of one.
How = Literal["cat", "copies", "transpose", "flat"]


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the foreign tensors it is made of."""

    ours: str
    foreign: tuple[str, ...]
    how: How = "cat"

    def prefixed(self, ours: str, foreign: str, *, drop: str = "") -> Entry:
        names = tuple(foreign + name.removeprefix(drop) for name in self.foreign)
        return Entry(ours + self.ours, names, self.how)


def _pair(ours: str, *foreign: str, how: How = "cat") -> Iterator[Entry]:
    """A module's weight and bias."""
    for part in ("weight", "bias"):
        yield Entry(f"{ours}.{part}", tuple(f"{name}.{part}" for name in foreign), how)


# Blocks and layers are written with `#` for their number.
_VISION_BLOCK = [  # ours (and timm's, and the original's), transformers'
    ("blocks.#.norm1", "encoder.layers.#.layer_norm1"),
    ("blocks.#.attn.qkv", "encoder.layers.#.self_attn.qkv"),
    ("blocks.#.attn.proj", "encoder.layers.#.self_attn.projection"),
    ("blocks.#.norm2", "encoder.layers.#.layer_norm2"),
    ("blocks.#.mlp.fc1", "encoder.layers.#.mlp.fc1"),
    ("blocks.#.mlp.fc2", "encoder.layers.#.mlp.fc2"),
]
_VISION = [
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    ("patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
    ("norm.weight", "post_layernorm.weight"),
    ("norm.bias", "post_layernorm.bias"),
]
_TEXT = [
    Entry("embeddings.word.weight", ("embeddings.word_embeddings.weight",)),
    Entry("embeddings.position.weight", ("embeddings.position_embeddings.weight",)),
    *_pair("embeddings.norm", "embeddings.LayerNorm"),
]
_TEXT_LAYER = [
    *_pair("self_attention.qkv", *(f"attention.self.{part}" for part in ("query", "key", "value"))),
    *_pair("self_attention.out.dense", "attention.output.dense"),
    *_pair("self_attention.out.norm", "attention.output.LayerNorm"),
    *_pair("feed_forward.intermediate", "intermediate.dense"),
    *_pair("feed_forward.out.dense", "output.dense"),
    *_pair("feed_forward.out.norm", "output.LayerNorm"),
]
_CROSS = [
    *_pair("cross_attention.attention.query", "crossattention.self.query"),
    *_pair(
        "cross_attention.attention.key_value",
        "crossattention.self.key",
        "crossattention.self.value",
    ),
    *_pair("cross_attention.out.dense", "crossattention.output.dense"),
    *_pair("cross_attention.out.norm", "crossattention.output.LayerNorm"),
]
_PAIRED_CROSS = [  # NLVR2: two images, two branches
    *(
        entry
        for n in (0, 1)
        for entry in (
            *_pair(f"cross_attention.attentions.{n}.query", f"crossattention.self{n}.query"),
            *_pair(
                f"cross_attention.attentions.{n}.key_value",
                f"crossattention.self{n}.key",
                f"crossattention.self{n}.value",
            ),
            *_pair(f"cross_attention.dense.{n}", f"crossattention.output.dense{n}"),
        )
    ),
    *_pair("cross_attention.merge", "crossattention.output.merge_layer"),
    *_pair("cross_attention.norm", "crossattention.output.LayerNorm"),
]
LM_TRANSFORM = [  # a language model's head but for the output embedding
    *_pair("lm_head.dense", "cls.predictions.transform.dense"),
    *_pair("lm_head.norm", "cls.predictions.transform.LayerNorm"),
    Entry(
        "lm_head.decoder.bias",
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
        "copies",
    ),
]
_LM_HEAD = [
    *LM_TRANSFORM,
    Entry("lm_head.decoder.weight", ("cls.predictions.decoder.weight",)),
]
_HEADS = [
    Entry("temp", ("temp",)),
    *_pair("vision_proj", "vision_proj"),
    *_pair("text_proj", "text_proj"),
    *_pair("itm_head", "itm_head"),
    *_pair("cls_head.0", "cls_head.0"),
    *_pair("cls_head.2", "cls_head.2"),
]
_TRAIN_STATE = [  # only the original's files hold it
    *_pair("twin.vision_proj", "vision_proj_m"),
    *_pair("twin.text_proj", "text_proj_m"),
    Entry("queue.image_queue", ("image_queue",), "transpose"),
    Entry("queue.text_queue", ("text_queue",), "transpose"),
    Entry("queue.id_queue", ("idx_queue",), "flat"),
    Entry("queue.ptr", ("queue_ptr",), "flat"),  # pre-training's name
    Entry("queue.ptr", ("ptr_queue",), "flat"),  # retrieval's
]


def vision_entries(kind: Kind, depth: int) -> Iterator[Entry]:
    """An image encoder's tensors, without prefix."""
    column = 1 if kind == "hf" else 0
    for names in _VISION:
        yield Entry(names[0], (names[column],))
    for i in range(depth):
        for names in _VISION_BLOCK:
            ours, foreign = (name.replace("#", str(i)) for name in (names[0], names[column]))
            yield from _pair(ours, foreign)


def text_entries(depth: int, *, cross: Literal["single", "paired"] | None) -> Iterator[Entry]:
    """A text transformer's tensors, without prefix, in the names of BERT and all BLIPs."""
    yield from _TEXT
    layer = [*_TEXT_LAYER]
    if cross is not None:
        layer += _PAIRED_CROSS if cross == "paired" else _CROSS
    for i in range(depth):
        for entry in layer:
            yield entry.prefixed(f"layers.{i}.", f"encoder.layer.{i}.")


def layout(
    kind: Literal["original", "hf"], *, vision_depth: int, text_depth: int, paired: bool = False
) -> list[Entry]:
    """Every tensor that a checkpoint of `kind` may hold."""
    image = "vision_model." if kind == "hf" else "visual_encoder."
    entries = [e.prefixed("visual_encoder.", image) for e in vision_entries(kind, vision_depth)]
    encoder = list(text_entries(text_depth, cross="paired" if paired else "single"))
    entries += [e.prefixed("text_encoder.", "text_encoder.") for e in encoder]
    decoder = text_entries(text_depth, cross="single")
    entries += [e.prefixed("text_decoder.", "text_decoder.bert.") for e in decoder]
    entries += [e.prefixed("text_decoder.", "text_decoder.") for e in _LM_HEAD]
    entries += _HEADS
    if kind == "original":
        vision = vision_entries(kind, vision_depth)
        entries += [e.prefixed("twin.visual_encoder.", "visual_encoder_m.") for e in vision]
        entries += [e.prefixed("twin.text_encoder.", "text_encoder_m.") for e in encoder]
        entries += _TRAIN_STATE
    return entries


@dataclass(frozen=True)
class Tensors:
    """Named tensors that are read on demand, so that only what is used takes memory.

    shapes, dtypes: of every tensor. read: the tensor of a name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tensors:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        return cls(shapes, dtypes, tensors.__getitem__)


def to_ours(source: Tensors, entries: Iterable[Entry]) -> Tensors:
    """`source` under our names. Names the table does not know stay as they are.

    Raises CheckpointError when a tensor of ours has only some of its foreign parts.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    made: dict[str, Entry] = {}
    known: set[str] = set()
    halves: list[str] = []
    for entry in entries:
        found = [name for name in entry.foreign if name in source.shapes]
        if not found:
            continue
        known.update(found)
        if entry.ours in shapes:
            halves.append(
                f"{entry.ours} is there twice: {found[0]} and {made[entry.ours].foreign[0]}"
            )
        if entry.how == "copies":
            entry = Entry(entry.ours, tuple(found), "copies")
        elif len(found) < len(entry.foreign):
            lost = [name for name in entry.foreign if name not in source.shapes]
            halves.append(f"{', '.join(lost)} (beside {', '.join(found)})")
            continue
        shapes[entry.ours] = _shape([source.shapes[name] for name in entry.foreign], entry.how)
        made[entry.ours] = entry
    if halves:
        listed = "\n  ".join(halves)
        raise CheckpointError(f"the checkpoint is incomplete, it lacks:\n  {listed}")
    rest = {name: shape for name, shape in source.shapes.items() if name not in known}
    dtypes = {name: source.dtypes[entry.foreign[0]] for name, entry in made.items()}
    dtypes |= {name: source.dtypes[name] for name in rest}

    def read(name: str) -> Tensor:
        if name not in made:
            return source.read(name)
        entry = made[name]
        return _join(entry, [source.read(part) for part in entry.foreign])

    return Tensors({**shapes, **rest}, dtypes, read)


def to_foreign(
    tensors: Mapping[str, Tensor], entries: Iterable[Entry], *, with_copies: bool = True
) -> dict[str, Tensor]:
    """The inverse of `to_ours`: our tensors under foreign names.

    with_copies: write every name of a tensor that has several. Raises CheckpointError for a tensor
    that the format has no name for.
    """
    out: dict[str, Tensor] = {}
    named: set[str] = set()
    for entry in entries:
        if entry.ours not in tensors or entry.ours in named:
            continue
        named.add(entry.ours)
        out.update(_split(entry, tensors[entry.ours], with_copies))
    unnamed = sorted(set(tensors) - named)
    if unnamed:
        raise CheckpointError(f"the format has no name for {', '.join(unnamed[:8])}")
    return out


def _shape(parts: list[tuple[int, ...]], how: How) -> tuple[int, ...]:
    first = parts[0]
    if how == "transpose":
        return first[::-1]
    if how == "flat":
        return tuple(n for n in first if n != 1)
    if how == "copies" or len(parts) == 1:
        return first
    return (sum(part[0] for part in parts), *first[1:])


def _join(entry: Entry, parts: list[Tensor]) -> Tensor:
    if entry.how == "transpose":
        return parts[0].T
    if entry.how == "flat":
        return parts[0].squeeze()
    if entry.how == "copies":
        if any(not torch.equal(parts[0], other) for other in parts[1:]):
            raise CheckpointError(f"{' and '.join(entry.foreign)} must be equal, but they differ")
        return parts[0]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(entry: Entry, tensor: Tensor, with_copies: bool) -> Iterator[tuple[str, Tensor]]:
    if entry.how == "transpose":
        yield entry.foreign[0], tensor.T
    elif entry.how == "flat":
        yield entry.foreign[0], tensor.reshape(1) if tensor.dim() == 0 else tensor[None]
    elif entry.how == "copies":
        names = entry.foreign if with_copies else entry.foreign[:1]
        yield from ((name, tensor) for name in names)
    elif len(entry.foreign) == 1:
        yield entry.foreign[0], tensor
    else:
        yield from zip(entry.foreign, tensor.chunk(len(entry.foreign)), strict=True)
