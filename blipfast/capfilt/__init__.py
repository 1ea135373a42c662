"""CapFilt: caption the images of a noisy set, keep the texts that match (BLIP, section 3.3)."""

from blipfast.capfilt.config import CapFiltConfig
from blipfast.capfilt.decisions import (
    Candidate,
    Decision,
    Score,
    filter_candidates,
    read_manifest,
)
from blipfast.capfilt.models import caption_records, score_records
from blipfast.capfilt.report import CapFiltReport
from blipfast.capfilt.run import run_capfilt, run_stage
from blipfast.checkpoints import model_hash

__all__ = [
    "Candidate",
    "CapFiltConfig",
    "CapFiltReport",
    "Decision",
    "Score",
    "caption_records",
    "filter_candidates",
    "model_hash",
    "read_manifest",
    "run_capfilt",
    "run_stage",
    "score_records",
]
