"""What the main job found: all that its page tells."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfast.capfilt import CapFiltReport, Decision
from blipfast.demo.measure import CaptionResult, FilterResult, RetrievalResult, TextQuality
from blipfast.demo.scenes import DemoData
from blipfast.demo.settings import DemoSettings
from blipfast.train.history import History


@dataclass
class Side:
    """One of the two models that are compared: "noisy" or "bootstrapped".

    captions: of the test's pictures, whose pairs of things are new. known_captions: of new pictures
    of pairs that training shows.
    """

    alignment: History
    pretraining: History
    captioning: History
    retrieval: RetrievalResult
    captions: CaptionResult
    known_captions: CaptionResult
    pairs: int


@dataclass
class DemoResult:
    """All that the page tells."""

    settings: DemoSettings
    data: DemoData
    noisy: Side
    bootstrapped: Side
    naming: History
    filtering: History
    filter: FilterResult
    texts: dict[str, TextQuality]
    capfilt: CapFiltReport
    decisions: list[Decision]
    seconds: dict[str, float] = field(default_factory=dict)
    machine: str = ""
    parameters: int = 0
    page: Path = Path()

    def numbers(self) -> dict[str, Any]:
        """The figures, for `results.json`."""

        def side(its: Side) -> dict[str, Any]:
            return {
                "itc": its.retrieval.itc.to_dict(),
                "itm": its.retrieval.itm.to_dict(),
                "cider": its.captions.cider,
                "right_captions": its.captions.right,
                "known_cider": its.known_captions.cider,
                "known_right_captions": its.known_captions.right,
                "pairs": its.pairs,
                "samples_per_second": its.pretraining.samples_per_second,
            }

        judged = {k: v for k, v in self.filter.to_dict().items() if k not in ("right", "wrong")}
        return {
            "settings": dataclasses.asdict(self.settings),
            "noisy": side(self.noisy),
            "bootstrapped": side(self.bootstrapped),
            "chance_r5": self.noisy.retrieval.chance(5),
            "filter": judged,
            "texts": {source: dataclasses.asdict(q) for source, q in self.texts.items()},
            "capfilt": dataclasses.asdict(self.capfilt),
            "seconds": self.seconds,
            "machine": self.machine,
            "parameters": self.parameters,
        }
