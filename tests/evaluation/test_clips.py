"""Manifests of clips, which frames are looked at, and how they are decoded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from clip_files import write_clip, write_manifest

from blipfast.errors import ConfigError, DataError
from blipfast.evaluation import clips
from blipfast.evaluation.clips import frame_numbers, pick_decoder, read_frames, read_manifest

INSTALLED = [name for name in ("torchcodec", "pyav", "dali") if clips._importable(name)]
assert "pyav" in INSTALLED  # it comes with what the tests need


def greys(frames: np.ndarray) -> list[int]:
    """The numbers of the frames, by their upper half."""
    return [round(float(frame[:20].mean()) / 8) for frame in frames]


def test_the_middle_of_each_share_or_the_originals_cut_step():
    assert frame_numbers(15, 8, "middle") == [0, 2, 4, 6, 8, 10, 12, 14]
    assert frame_numbers(15, 8, "original") == list(range(8))  # as numpy cut the step of 1.875
    assert frame_numbers(16, 4, "original") == [0, 4, 8, 12]
    assert frame_numbers(3, 4, "original") == frame_numbers(3, 4, "middle") == [0, 1, 1, 2]


@pytest.mark.parametrize("decoder", INSTALLED)
def test_each_decoder_gives_the_frames_asked_for(decoder, tmp_path):
    path = write_clip(tmp_path / "a.avi", 15, codec="mjpeg")
    assert greys(read_frames(path, 8, decoder=decoder)) == [0, 2, 4, 6, 8, 10, 12, 14]
    original = read_frames(path, 8, sampling="original", decoder=decoder)
    assert greys(original) == list(range(8))
    assert original.shape == (8, 48, 64, 3)
    assert original.dtype == np.uint8
    assert greys(read_frames(path, 20, decoder=decoder))[-1] == 14  # some come twice


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_frames_between_key_frames(name, tmp_path):
    path = write_clip(tmp_path / name, 30, codec="mpeg4")
    assert greys(read_frames(path, 5, decoder="pyav")) == [3, 9, 15, 21, 27]


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("what", ["half", "text", "empty", "absent", "folder"])
def test_what_is_no_whole_clip_is_named(what, decoder, tmp_path):
    path = tmp_path / "clip.mp4"
    whole = write_clip(tmp_path / "whole.mp4", codec="mpeg4").read_bytes()
    content = {"half": whole[: len(whole) // 2], "text": b"not a clip", "empty": b""}
    if what in content:
        path.write_bytes(content[what])
    elif what == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"clip\.mp4"):
        read_frames(path, 4, decoder=decoder)


def test_a_clip_whose_header_tells_of_more_is_named(tmp_path):
    path = write_clip(tmp_path / "clip.avi", 30, codec="mjpeg")
    content = bytearray(path.read_bytes())
    begin = content.index(b"movi")
    places = [i for i in range(begin, len(content) - 4) if content[i : i + 4] == b"00dc"]
    path.write_bytes(content[: places[12]])
    with pytest.raises(DataError, match=r"clip\.avi: it breaks off, 12 of 30 frames"):
        read_frames(path, 4, decoder="pyav")


@pytest.mark.parametrize(("name", "codec"), [("clip.mkv", "mpeg4"), ("clip.webm", "libvpx-vp9")])
def test_a_clip_shorter_than_its_header_says_is_named(name, codec, tmp_path):
    path = write_clip(tmp_path / name, 30, codec=codec)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"it breaks off after .* of 3.0 seconds"):
        read_frames(path, 4, decoder="pyav")


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_short_clip_is_whole(frames, tmp_path):
    for name in ("a.mkv", "a.mp4", "a.avi"):
        path = write_clip(tmp_path / name, frames)
        assert len(read_frames(path, 4, decoder="pyav")) == 4


def test_sound_alone_is_no_clip(tmp_path):
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0" * 1600)
    with pytest.raises(DataError, match=r"a\.wav: it has no pictures"):
        read_frames(tmp_path / "a.wav", 4, decoder="pyav")


def test_without_a_decoder_the_package_is_named(monkeypatch):
    monkeypatch.setattr(clips, "_importable", lambda name: False)
    with pytest.raises(ConfigError, match="pip install torchcodec, av or nvidia-dali-cuda130"):
        pick_decoder()
    with pytest.raises(ConfigError, match=r"pip install av$"):
        pick_decoder("pyav")


def test_a_manifest_and_its_faults(tmp_path):
    path = write_manifest(tmp_path, [{"video": "x/a.mp4", "texts": [("a dog", "human")]}])
    (clip,) = read_manifest(tmp_path)
    assert (clip.key, clip.path) == ("line0", tmp_path / "x/a.mp4")
    assert clip.texts[0].source == "human"
    for content, message in (
        ("\n", "names no clip"),
        ('{"key": 1}\n', "line 1: not an object with key"),
        ("{broken\n", "line 1: not an object"),
        ('{"key": "k", "video": "a", "texts": [], "ids": {}}\n', "clip k has no text"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_manifest(path)
    with pytest.raises(DataError, match="cannot read the manifest"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "val.videos.jsonl").write_text("")
    with pytest.raises(DataError, match="holds 2 manifests"):
        read_manifest(tmp_path)
