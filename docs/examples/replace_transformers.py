"""transformers' BLIP captioner replaced by blipfast's in three lines; the same token ids.

    python docs/examples/replace_transformers.py MODEL_DIRECTORY PICTURE...

MODEL_DIRECTORY: a Hugging Face directory of `BlipForConditionalGeneration` with its tokenizer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from transformers import BlipForConditionalGeneration

from blipfast import load_model
from blipfast.data import BlipTokenizer, EvalTransform, load_image


def main(argv: Sequence[str]) -> int:
    directory, *pictures = argv
    theirs = BlipForConditionalGeneration.from_pretrained(directory).eval()
    transform = EvalTransform(theirs.config.vision_config.image_size)
    pixels = torch.stack([transform(load_image(picture)) for picture in pictures])
    tokenizer = BlipTokenizer.from_pretrained_dir(directory)
    prompt = tokenizer("a picture of ", kind="raw").input_ids

    with torch.no_grad():
        start = time.perf_counter()
        old = theirs.generate(
            pixel_values=pixels, input_ids=prompt.repeat(len(pixels), 1), num_beams=3, max_length=20
        )
        between = time.perf_counter()
        # The three lines: load the same directory, generate, decode.
        model = load_model(directory, task="caption")
        new = model.generate(
            pixels, prompt_ids=prompt[0, :-1], beam_length="generated", min_length=0
        )
        captions = [tokenizer.decode(row) for row in new.new_tokens(sep_token_id=102)]
        end = time.perf_counter()
    width = min(old.shape[1], new.sequences.shape[1])
    # transformers writes [BOS] where the decoder's own first token stands.
    assert torch.equal(old[:, 1:width], new.sequences[:, 1:width]), "other token ids"
    for picture, caption in zip(pictures, captions, strict=True):
        print(f"{picture}\t{caption}")
    print(f"transformers {between - start:.2f} s, blipfast with loading {end - between:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
