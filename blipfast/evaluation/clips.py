"""Clips: the manifest that names them, and their frames, by whichever decoder is installed."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from blipfast.data import TextEntry
from blipfast.errors import ConfigError, DataError
from blipfast.tasks.video import sample_frames

Sampling = Literal["middle", "original"]
DecoderName = Literal["auto", "torchcodec", "pyav", "dali"]
_MODULES = {"torchcodec": "torchcodec.decoders", "pyav": "av", "dali": "nvidia.dali"}
_PACKAGES = {"torchcodec": "torchcodec", "pyav": "av", "dali": "nvidia-dali-cuda130"}
_WHOLE = 0.9  # of the frames that a file's header promises


@dataclass(frozen=True)
class Clip:
    """One line of a manifest: texts with their sources, and what the clip is called elsewhere."""

    key: str
    path: Path
    texts: tuple[TextEntry, ...]
    ids: dict[str, int | str]


def read_manifest(path: str | os.PathLike[str]) -> list[Clip]:
    """The clips of a `videos.jsonl` manifest, or of the only one in a folder.

    Raises DataError naming the file and line that cannot be used.
    """
    place = Path(path)
    if place.is_dir():
        found = sorted(place.glob("*videos.jsonl"))
        if len(found) != 1:
            raise DataError(
                f"{place} holds {len(found)} manifests (*videos.jsonl); name the file itself"
            )
        place = found[0]
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the manifest {place}: {error}") from error
    clips = [_clip(line, place, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not clips:
        raise DataError(f"the manifest {place} names no clip")
    return clips


def _clip(line: str, manifest: Path, number: int) -> Clip:
    where = f"{manifest}, line {number}"
    try:
        row = json.loads(line)
        texts = tuple(TextEntry(str(one["text"]), str(one["source"])) for one in row["texts"])
        clip = Clip(str(row["key"]), manifest.parent / row["video"], texts, dict(row["ids"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not an object with key, video, texts and ids") from error
    if not texts:
        raise DataError(f"{where}: clip {clip.key} has no text")
    return clip


def frame_numbers(frames: int, count: int, sampling: Sampling) -> list[int]:
    """Which of a clip's frames are looked at.

    middle: the middle of each of `count` equal shares. original: as the original samples, whose
    step is cut to a whole number, so that of 15 frames it takes the first 8 and never the rest; a
    clip with fewer than `count` frames, which it cannot take, is sampled by middles.
    """
    if sampling == "middle" or frames < count:
        return sample_frames(frames, count)
    return [i * (frames // count) for i in range(count)]


def pick_decoder(name: DecoderName = "auto") -> DecoderName:
    """The decoder by name, or the first that is installed. Raises ConfigError otherwise."""
    known: tuple[DecoderName, ...] = ("torchcodec", "pyav", "dali")
    for one in known if name == "auto" else (name,):
        if _importable(one):
            return one
    needs = "torchcodec, av or nvidia-dali-cuda130" if name == "auto" else _PACKAGES[name]
    raise ConfigError(f"reading clips needs a decoder: pip install {needs}")


def _importable(name: str) -> bool:
    try:
        importlib.import_module(_MODULES[name])
        return True
    except (ImportError, OSError, RuntimeError):  # torchcodec: there is no FFmpeg it knows
        return False


def read_frames(
    path: Path, count: int, *, sampling: Sampling = "middle", decoder: DecoderName = "auto"
) -> np.ndarray:
    """`count` frames of a clip, `(count, H, W, 3)` uint8 RGB.

    Raises DataError naming the clip when it is missing, damaged or breaks off.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such clip")
    read = _READERS[pick_decoder(decoder)]
    try:
        frames = read(path, lambda total: frame_numbers(total, count, sampling))
    except (DataError, ConfigError):
        raise
    except Exception as error:  # decoders raise many kinds on damaged data
        raise DataError(f"{path}: damaged, or not a video ({error})") from error
    if len(frames) != count:
        raise DataError(f"{path}: only {len(frames)} of {count} frames can be decoded")
    return frames


Choose = Callable[[int], Sequence[int]]


def _by_pyav(path: Path, choose: Choose) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path}: it has no pictures, only sound or text")
        stream = container.streams.video[0]
        promised = int(stream.frames)
        packets, end = 0, 0.0
        for packet in container.demux(stream):
            if packet.size:
                packets += 1
                end = max(end, float((packet.pts or 0) * packet.time_base))
        # Matroska tells no number of frames, but how long the longest of its streams lasts.
        alone = len(container.streams) == 1
        length = (container.duration or 0) / av.time_base if alone else 0.0
    if packets < _WHOLE * promised:
        raise DataError(f"{path}: it breaks off, {packets} of {promised} frames are there")
    if end * packets < _WHOLE * length * (packets - 1):  # the last frame lasts a while too
        raise DataError(f"{path}: it breaks off after {end:.1f} of {length:.1f} seconds")
    wanted = choose(packets)
    found: dict[int, np.ndarray] = {}
    last = 0
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for last, frame in enumerate(container.decode(video=0)):
            if last in wanted:
                found[last] = frame.to_ndarray(format="rgb24")
            if last >= wanted[-1]:
                break
    if len(found) < len(set(wanted)) and last + 1 >= _WHOLE * packets:
        # A few packets may hold no frame of their own: choose among those that came out.
        return _by_pyav(path, lambda _: choose(last + 1))
    return np.stack([found[number] for number in wanted if number in found])


def _by_torchcodec(path: Path, choose: Choose) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", seek_mode="exact")
    promised = decoder.metadata.num_frames_from_header or 0
    if len(decoder) < _WHOLE * promised:
        raise DataError(f"{path}: it breaks off, {len(decoder)} of {promised} frames are there")
    return decoder.get_frames_at(list(choose(len(decoder)))).data.cpu().numpy()


def _by_dali(path: Path, choose: Choose) -> np.ndarray:
    """On a CPU DALI knows VP8, VP9 and MJPEG only; H.264 and others need a card."""
    import torch
    from nvidia.dali import fn, pipeline_def

    card = torch.cuda.current_device() if torch.cuda.is_available() else None

    @pipeline_def(batch_size=1, num_threads=1, device_id=card)
    def whole() -> Any:
        encoded = fn.external_source(name="encoded")
        return fn.decoders.video(encoded, device="cpu" if card is None else "mixed")

    pipe = whole()
    pipe.build()
    pipe.feed_input("encoded", [np.frombuffer(path.read_bytes(), np.uint8)])
    (out,) = pipe.run()
    frames = np.asarray((out if card is None else out.as_cpu())[0])
    return frames[list(choose(len(frames)))]


_READERS: dict[str, Callable[[Path, Choose], np.ndarray]] = {
    "torchcodec": _by_torchcodec,
    "pyav": _by_pyav,
    "dali": _by_dali,
}
