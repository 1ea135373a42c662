"""Small clips and manifests for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np


def write_clip(path: Path, frames: int = 12, hue: int = 0, codec: str = "mpeg4") -> Path:
    """Frame n is grey 8 n, with a bar that tells clips apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 8 * number, np.uint8)
            pixels[24:, :, hue % 3] = 255 - 20 * hue
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_manifest(folder: Path, rows: list[dict]) -> Path:
    """rows: video and texts (pairs of text and source), ids."""
    lines = [
        {
            "key": f"line{n}",
            "video": row["video"],
            "texts": [{"text": text, "source": source} for text, source in row["texts"]],
            "ids": row.get("ids", {}),
        }
        for n, row in enumerate(rows)
    ]
    path = folder / "test.videos.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
