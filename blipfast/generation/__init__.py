"""Generation: greedy, beam search and nucleus sampling over a `TextTransformer` with an LM head."""

from blipfast.generation.api import Generation, evaluation, generate, generate_stream
from blipfast.generation.captions import caption_images, caption_stream
from blipfast.generation.options import GenerationOptions

__all__ = [
    "Generation",
    "GenerationOptions",
    "caption_images",
    "caption_stream",
    "evaluation",
    "generate",
    "generate_stream",
]
