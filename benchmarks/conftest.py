"""One allocator for every code that is timed."""

from __future__ import annotations

from blipfast.environment import keep_freed_memory

keep_freed_memory()
