"""Which checkpoint may become which model, and what may then be left unused, copied or fresh.

A table, so that nothing happens in silence: whatever a row does not allow is an error, and whatever
it allows is named in the `LoadReport`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from blipfast.models.blip import Blip
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.features import BlipFeatureExtractor
from blipfast.tasks.nlvr import BlipForNLVR
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.tasks.visdial import BlipForVisDial
from blipfast.tasks.vqa import BlipForVQA

TASKS: dict[str, type[Blip]] = {
    "pretrain": BlipForPretraining,
    "caption": BlipForCaptioning,
    "retrieval": BlipForRetrieval,
    "vqa": BlipForVQA,
    "nlvr": BlipForNLVR,
    "visdial": BlipForVisDial,
    "features": BlipFeatureExtractor,
}

# Parts of a model, by our names.
_GROUPS = {
    "position ids": r"(.*\.)?position_ids",  # a constant that old checkpoints store
    "text encoder": r"text_encoder\..*",
    "text decoder": r"text_decoder\..*",
    "decoder cross-attention": r"text_decoder\.layers\.\d+\.cross_attention\.attention\.key_v.*",
    "cross-attention": r"text_encoder\.layers\.\d+\.cross_attention\..*",
    "merge layers": r"text_encoder\.layers\.\d+\.cross_attention\.merge\..*",
    "contrastive projections": r"(vision|text)_proj\..*",
    "temperature": r"temp",
    "matching head": r"itm_head\..*",
    "class head": r"cls_head\..*",
    "caption encoder": r"caption_(encoder|proj)\..*",
    "caption projection": r"caption_proj\..*",
    "momentum twin": r"twin\..*",
    "momentum cross-attention": r"twin\.text_encoder\.layers\.\d+\.cross_attention\..*",
    "feature queue": r"queue\..*",
    # Of the parts that a model may be initialised from.
    "classification head": r"(head|head_dist|fc_norm|pre_logits)\..*",
    "BERT's heads": r"(pooler|cls|lm_head)\..*",
    "token types": r"embeddings\.token_type_embeddings\..*",
    "what BERT lacks": r"(layers\.\d+\.cross_attention|lm_head)\..*",
}
_PATTERNS = {group: re.compile(pattern) for group, pattern in _GROUPS.items()}


@dataclass(frozen=True)
class Copy:
    """A tensor that the checkpoint lacks is copied from another: pattern of names and source."""

    rule: str
    target: str
    source: str


# The twin of a model that had none begins as a copy of it.
_TWIN_FROM_STUDENT = Copy("momentum twin copied from the model", r"twin\.(.*)", r"\1")
_BRANCHES = (
    Copy(
        "both image branches copied from the one cross-attention",
        r"(text_encoder\.layers\.\d+\.cross_attention)\.attentions\.[01]\.(.*)",
        r"\1.attention.\2",
    ),
    Copy(
        "both image branches copied from the one cross-attention",
        r"(text_encoder\.layers\.\d+\.cross_attention)\.dense\.[01]\.(.*)",
        r"\1.out.dense.\2",
    ),
    Copy(
        "the branches' LayerNorm copied from the one cross-attention",
        r"(text_encoder\.layers\.\d+\.cross_attention)\.norm\.(.*)",
        r"\1.out.norm.\2",
    ),
)
_CAPTION_ENCODER = (
    Copy(
        "caption encoder copied from the text encoder", r"caption_encoder\.(.*)", r"text_encoder.\1"
    ),
)


@dataclass(frozen=True)
class Transfer:
    """What is allowed when a checkpoint of one task becomes a model of another.

    unused: groups of the checkpoint that the model may leave unused.
    fresh: groups of the model that may stay as they were initialised. copies: see `Copy`.
    fresh_if_misshapen: groups that may be fresh where the checkpoint's do not fit;
    fresh_on_request: only with `allow_fresh`.
    """

    unused: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()
    fresh_if_misshapen: tuple[str, ...] = ()
    fresh_on_request: tuple[str, ...] = ()

    def matching(self, groups: Iterable[str], name: str) -> str | None:
        """The first of `groups` that the tensor `name` belongs to."""
        return next((group for group in groups if _PATTERNS[group].fullmatch(name)), None)


# The original's momentum encoder has a cross-attention that nothing uses.
_ALWAYS_UNUSED = ("position ids", "momentum cross-attention")
_STATE = ("momentum twin", "feature queue")
_ITC = ("contrastive projections", "temperature")
_QUEUE = ("feature queue",)

TRANSFERS: dict[tuple[str, str], Transfer] = {
    ("pretrain", "pretrain"): Transfer(fresh_if_misshapen=_QUEUE),
    ("pretrain", "retrieval"): Transfer(
        unused=("text decoder", *_STATE), fresh=_QUEUE, fresh_if_misshapen=_QUEUE
    ),
    ("pretrain", "caption"): Transfer(unused=("text encoder", "matching head", *_ITC, *_STATE)),
    ("pretrain", "vqa"): Transfer(
        unused=("matching head", *_ITC, *_STATE), fresh_on_request=("decoder cross-attention",)
    ),
    ("pretrain", "nlvr"): Transfer(
        unused=("cross-attention", "text decoder", "matching head", *_ITC, *_STATE),
        fresh=("class head", "merge layers"),
        copies=_BRANCHES,
    ),
    ("pretrain", "visdial"): Transfer(
        unused=("text decoder", *_ITC, *_STATE),
        fresh=("caption projection",),
        copies=_CAPTION_ENCODER,
    ),
    ("pretrain", "features"): Transfer(unused=("text decoder", "matching head", *_ITC, *_STATE)),
    # Published scorers have no temperature, twin or queue.
    ("retrieval", "retrieval"): Transfer(
        unused=_STATE,
        fresh=("temperature", *_QUEUE),
        copies=(_TWIN_FROM_STUDENT,),
        fresh_if_misshapen=_QUEUE,
    ),
    ("retrieval", "nlvr"): Transfer(
        unused=("cross-attention", "matching head", *_ITC, *_STATE),
        fresh=("class head", "merge layers"),
        copies=_BRANCHES,
    ),
    ("retrieval", "visdial"): Transfer(
        unused=(*_ITC, *_STATE), fresh=("caption projection",), copies=_CAPTION_ENCODER
    ),
    ("retrieval", "features"): Transfer(unused=("matching head", *_ITC, *_STATE)),
    ("vqa", "features"): Transfer(unused=("text decoder",)),
    ("visdial", "features"): Transfer(unused=("caption encoder", "matching head")),
    **{(task, task): Transfer() for task in ("caption", "vqa", "nlvr", "visdial", "features")},
}


def transfer(source_task: str, task: str) -> Transfer | None:
    """The row of the table; None when such a checkpoint was not meant to become such a model."""
    row = TRANSFERS.get((source_task, task))
    if row is None:
        return None
    return Transfer(
        (*_ALWAYS_UNUSED, *row.unused),
        row.fresh,
        row.copies,
        row.fresh_if_misshapen,
        row.fresh_on_request,
    )


def targets_of(source_task: str) -> list[str]:
    """The tasks that a checkpoint of `source_task` can be loaded for."""
    return [task for (source, task) in TRANSFERS if source == source_task]


def task_of_names(names: Iterable[str]) -> str:
    """The task of a checkpoint, from our names of its tensors."""
    parts = {name.split(".")[0] for name in names}
    paired = any(".cross_attention.attentions." in name for name in names)
    if paired or "cls_head" in parts:
        return "nlvr"
    if "caption_encoder" in parts:
        return "visdial"
    if "text_decoder" in parts:
        if "text_encoder" not in parts:
            return "caption"
        return "pretrain" if "itm_head" in parts else "vqa"
    return "retrieval" if "itm_head" in parts else "features"


def task_of_model(model: Blip) -> str:
    """The task whose class `model` is an instance of."""
    for task, cls in TASKS.items():
        if isinstance(model, cls):
            return task
    raise TypeError(f"{type(model).__name__} is none of blipfast's task models")
