"""From encoded images to the pixels of a batch, by Pillow or by NVIDIA DALI.

Both look at an image in the same way (`augment.View`). DALI reads plain JPEGs, cropping while it
decodes; on a CUDA card it also resizes, and RandAugment follows there (`device_augment`). What else
there is (PNG, CMYK, 16 bits, animations) goes through Pillow, so that one set of rules holds. An
image that cannot be decoded is an error of its own, never of the batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from blipfast.data.augment import View
from blipfast.data.device_augment import finish_views
from blipfast.data.images import image_size, load_image
from blipfast.errors import ConfigError

LoaderName = Literal["auto", "torch", "dali"]
DALI_PACKAGE = "nvidia-dali-cuda130"  # plain `nvidia-dali` on the index is an empty stub


@dataclass(frozen=True)
class Job:
    """One image to look at. plain: DALI may decode it."""

    key: str
    data: bytes
    view: View
    plain: bool


def plan_job(key: str, data: bytes, plan: Callable[[int, int], View]) -> Job:
    """Plans the view of an encoded image. Raises DataError when its header is unusable."""
    width, height, plain = image_size(data, key)
    return Job(key, data, plan(width, height), plain)


def by_pillow(job: Job) -> np.ndarray:
    """``(side, side, 3)`` uint8. Raises DataError when the image is damaged."""
    return np.asarray(job.view.of(load_image(job.data, job.key)))


def pick_loader(name: LoaderName, device: torch.device) -> Literal["torch", "dali"]:
    """`auto` takes DALI for a CUDA card where it is installed.

    Raises ConfigError when DALI is asked for and absent.
    """
    found = importlib.util.find_spec("nvidia.dali") is not None if _has_nvidia() else False
    if name == "dali" and not found:
        raise ConfigError(f"data.loader=dali needs NVIDIA DALI: pip install {DALI_PACKAGE}")
    if name == "auto":
        return "dali" if found and device.type == "cuda" else "torch"
    return name


def _has_nvidia() -> bool:
    return importlib.util.find_spec("nvidia") is not None


class DaliDecoder:
    """Decodes batches of jobs, all with views of the same side.

    device: `cpu`, or a CUDA card, whose JPEG engine then decodes. threads: DALI's own.
    largest: images in a batch at most. pool: runs Pillow for what DALI does not take.
    """

    def __init__(
        self, side: int, largest: int, threads: int, device: torch.device, pool: Executor
    ) -> None:
        self.side, self.largest, self.threads = side, largest, threads
        self.device, self.pool = device, pool
        self.rebuilt = 0
        self._pipe: Any = None

    def decode(self, jobs: Sequence[Job]) -> list[Future[np.ndarray]]:
        """``(side, side, 3)`` uint8 of each job to come, or a DataError saying what is wrong.

        DALI has decoded when this returns; the pool resizes and augments while the next batch is
        decoded.
        """
        plain = [i for i, job in enumerate(jobs) if job.plain]
        futures = {
            i: self.pool.submit(by_pillow, job) for i, job in enumerate(jobs) if not job.plain
        }
        crops = self._run([jobs[i] for i in plain]) if plain else []
        if crops is None:  # one of them is damaged: Pillow tells which, and reads the others
            futures |= {i: self.pool.submit(by_pillow, jobs[i]) for i in plain}
        elif isinstance(crops, torch.Tensor):  # all on the card
            finished = finish_views(crops, [jobs[i].view for i in plain]).cpu().numpy()
            for i, square in zip(plain, finished, strict=True):
                futures[i] = Future()
                futures[i].set_result(square)
        else:
            futures |= {
                i: self.pool.submit(_finished, jobs[i].view, crop)
                for i, crop in zip(plain, crops, strict=True)
            }
        return [futures[i] for i in range(len(jobs))]

    def _run(self, jobs: list[Job]) -> list[np.ndarray] | torch.Tensor | None:
        """Crops, or None when DALI has given up on the batch.

        On a GPU they are resized, ``(N, side, side, 3)``, lie there, and are valid until the next
        run; on a CPU each keeps DALI's memory for as long as it is used.
        """
        if self._pipe is None:
            self._pipe = _pipeline(self.side, self.largest, self.threads, self.device)
        boxes = np.array([job.view.box for job in jobs], dtype=np.float32)
        try:
            self._pipe.feed_input("encoded", [np.frombuffer(job.data, np.uint8) for job in jobs])
            self._pipe.feed_input("start", list(boxes[:, :2]))
            self._pipe.feed_input("shape", list(boxes[:, 2:] - boxes[:, :2]))
            (out,) = self._pipe.run()
            if self.device.type == "cuda":
                return torch.from_dlpack(out.as_tensor())
            return [np.asarray(out[i]) for i in range(len(jobs))]
        except RuntimeError:  # the pipeline is of no use after an error
            self._pipe = None
            self.rebuilt += 1
            return None

    def close(self) -> None:
        self._pipe = None


def _finished(view: View, crop: np.ndarray) -> np.ndarray:
    return np.asarray(view.finish(crop))


def _pipeline(side: int, largest: int, threads: int, device: torch.device) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=largest,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
    )
    def crops() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.FLOAT, ndim=1)
        images = fn.decoders.image_slice(
            encoded, start, shape, axis_names="WH", normalized_anchor=False,
            normalized_shape=False, output_type=types.RGB, jpeg_fancy_upsampling=True,
            device="mixed" if on_gpu else "cpu",
        )  # fmt: skip
        if not on_gpu:  # PyTorch resizes several times as fast
            return images
        return fn.resize(images, size=[side, side], interp_type=types.INTERP_CUBIC, antialias=True)

    pipe = crops()
    pipe.build()
    return pipe
