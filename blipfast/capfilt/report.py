"""What a run did, in numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass
class CapFiltReport:
    """What a run did.

    texts: candidates by source. accepted: those in the new set, by source. images: read. kept:
    with at least one accepted text. unreadable: set aside, named in the manifest. shards: the new
    set. human_shards: human-written sets that joined it. manifest: one row of JSON for each
    decision. skipped_shards: written by an earlier run.
    """

    shards: list[str] = field(default_factory=list)
    manifest: str = ""
    human_shards: list[str] = field(default_factory=list)
    texts: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    images: int = 0
    kept: int = 0
    unreadable: int = 0
    skipped_shards: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)
