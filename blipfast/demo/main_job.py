"""The main job: pre-train, fine-tune captioner and filter, CapFilt, train again, compare.

Everything is kept in the output folder: data and models, shards and manifest, `results.json` and
the page. Steps of both pre-trainings, their starting weights and their batch sizes are equal; only
the texts of the web pictures differ.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from blipfast.capfilt import CapFiltConfig, CapFiltReport, read_manifest, run_capfilt
from blipfast.capfilt.decisions import write_lines
from blipfast.checkpoints import save_model
from blipfast.data import BlipTokenizer, ShardWriter, read_shards
from blipfast.demo.backbone import train_backbone
from blipfast.demo.learning import (
    align,
    demo_config,
    demo_tokenizer,
    finetune_captioner,
    finetune_filter,
    new_model,
    pretrain,
)
from blipfast.demo.measure import (
    measure_captions,
    measure_filter,
    measure_retrieval,
    measure_texts,
)
from blipfast.demo.page import write_page
from blipfast.demo.result import DemoResult, Side
from blipfast.demo.samples import Samples
from blipfast.demo.scenes import DemoData, build_demo_data
from blipfast.demo.settings import DemoSettings
from blipfast.errors import DataError
from blipfast.models.vit import VisionTransformer


def run_demo(settings: DemoSettings, console: Console | None = None) -> DemoResult:
    """Runs the main job; `result.page` is the path of its report.

    Raises:
        ConfigError, DataError: a setting or a missing package, in words.
        TrainingError: a loss is not finite.
    """
    settings = settings.scaled()
    console = console or Console(stderr=True)
    torch.set_num_threads(settings.threads)
    job = _Job(settings, console)
    return job.run()


class _Job:
    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.out = Path(settings.out)
        self.seconds: dict[str, float] = {}
        self.tokenizer: BlipTokenizer
        self.data: DemoData
        self.backbone: dict[str, torch.Tensor]

    def run(self) -> DemoResult:
        settings = self.settings
        self._fresh_folder()
        with self._stage("draw the scenes"):
            self.data = self._draw()
            self.tokenizer, self.rows = demo_tokenizer()
            clean = Samples.from_demo(self.data.clean)
        with self._stage("teach the image encoder to name things"):
            torch.manual_seed(settings.seed)
            encoder = VisionTransformer(demo_config(settings, self.tokenizer).vision)
            naming = train_backbone(encoder, settings, "image encoder: naming")
            self.backbone = encoder.state_dict()
        noisy = self._side("noisy", Samples.from_demo(self.data.web) + clean, clean)
        with self._stage("fine-tune the filter"):
            judge, filtering = finetune_filter(
                self.out / "noisy", clean, self.tokenizer, settings, "filter: ITC + ITM"
            )
            save_model(judge, self.out / "filter", overwrite=True)
        with self._stage("caption and filter the web"):
            report = self._capfilt()
            decisions = list(read_manifest(report.manifest))
            judged = measure_filter(decisions, self.data.web, settings.threshold)
            texts = measure_texts(decisions, self.data.web)
        for source, its in texts.items():
            self._say(
                f"  {source} texts: {its.right:.0%} right; of the {its.accepted} accepted "
                f"{its.accepted_right:.0%}"
            )
        records = list(read_shards(report.shards)) if report.shards else []
        if not records:
            raise DataError("the filter rejected every text; train longer (--minutes)")
        bootstrapped = self._side("bootstrapped", Samples.from_records(records) + clean, clean)
        result = DemoResult(
            settings, self.data, noisy, bootstrapped, naming, filtering, judged, texts, report,
            decisions, self.seconds, _machine(), self.parameters,
        )  # fmt: skip
        self._write(result)
        return result

    def _fresh_folder(self) -> None:
        """The web shards and CapFilt's output of an earlier run make way for this one's."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for folder in ("web", "bootstrapped-shards"):
                for file in sorted((self.out / folder).rglob("*"), reverse=True):
                    file.unlink() if file.is_file() else file.rmdir()
        except OSError as error:
            raise DataError(f"cannot use the folder {self.out}: {error.strerror}") from error

    def _draw(self) -> DemoData:
        s = self.settings
        data = build_demo_data(
            seed=s.seed, num_web=s.num_web, num_clean=s.num_clean, num_test=s.num_test,
            num_val=s.num_val, image_size=s.image_size, noise=s.noise, hard_share=s.hard_share,
            num_concepts=s.num_concepts,
        )  # fmt: skip
        with ShardWriter(self.out / "web", "web", max_count=2_000) as writer:
            for record in data.web:
                writer.write(record.to_record())
        return data

    def _side(self, name: str, samples: Samples, clean: Samples) -> Side:
        """Pre-trains one of the two models from the same start, and measures it."""
        s = self.settings
        with self._stage(f"pre-train on the {name} set"):
            model = new_model(s, self.tokenizer, self.rows, self.backbone)
            self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            aligned = align(model, samples, self.tokenizer, s, f"align, {name} texts")
            learnt = pretrain(model, samples, self.tokenizer, s, f"pre-train, {name} texts")
            save_model(model.eval(), self.out / name, overwrite=True)
        with self._stage(f"fine-tune a captioner ({name})"):
            captioner, tuned = finetune_captioner(
                self.out / name, clean, self.tokenizer, s, f"captioner, {name}: LM"
            )
            save_model(captioner, self.out / f"{name}-captioner", overwrite=True)
        with self._stage(f"measure ({name})"):
            k = min(s.top_k_rerank, len(self.data.test))
            found = measure_retrieval(model, self.data.test, self.tokenizer, k)
            spoken, known = (
                measure_captions(captioner, records, self.tokenizer, s.prompt)
                for records in (self.data.test, self.data.val)
            )
        self._say(
            f"  {name}: R@5 by ITC {found.itc.tr_r5:.1f}/{found.itc.ir_r5:.1f}, re-ranked "
            f"{found.itm.tr_r5:.1f}/{found.itm.ir_r5:.1f} (chance {found.chance(5):.1f}), "
            f"CIDEr {spoken.cider:.2f}; of known pairs {known.cider:.2f}, {known.right:.0%} of "
            "captions right"
        )
        return Side(aligned, learnt, tuned, found, spoken, known, len(samples))

    def _capfilt(self) -> CapFiltReport:
        s = self.settings
        self.tokenizer.save(self.out / "filter")
        config = CapFiltConfig(
            input=str(self.out / "web"),
            output=str(self.out / "bootstrapped-shards"),
            captioners=(str(self.out / "noisy-captioner"),),
            filters=(str(self.out / "filter"),),
            device="cpu",
            prompt=s.prompt,
            min_length=6,
            max_length=30,
            threshold=s.threshold,
            synthetic_threshold=s.synthetic_threshold,
            seed=s.seed,
            batch_size=64,
            max_text_tokens=30,
        )
        return run_capfilt(config)

    def _write(self, result: DemoResult) -> None:
        write_lines(self.out / "results.json", [json.dumps(result.numbers(), indent=1)])
        result.page = write_page(result, self.out / "report.html")

    @contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        self._say(f"[bold]{title}[/bold]")
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)


def _machine() -> str:
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
