"""Texts, images and shards; knows no model."""

from blipfast.data.augment import RANDAUGMENT_OPS, TrainTransform, View
from blipfast.data.clean import pre_caption, pre_question
from blipfast.data.images import (
    IMAGE_MEAN,
    IMAGE_STD,
    EvalTransform,
    load_image,
    normalise,
    to_tensor,
)
from blipfast.data.shards import (
    BadRecord,
    Record,
    ShardReader,
    ShardWriter,
    TextEntry,
    read_shards,
)
from blipfast.data.text import BlipTokenizer, TextBatch, TextKind, load_tokenizer

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "RANDAUGMENT_OPS",
    "BadRecord",
    "BlipTokenizer",
    "EvalTransform",
    "Record",
    "ShardReader",
    "ShardWriter",
    "TextBatch",
    "TextEntry",
    "TextKind",
    "TrainTransform",
    "View",
    "load_image",
    "load_tokenizer",
    "normalise",
    "pre_caption",
    "pre_question",
    "read_shards",
    "to_tensor",
]
