"""What the site takes from the project itself: measured results, docstrings and pictures.

`<!-- results: NAME -->` in a page becomes benchmarks/results/NAME, `<!-- api: MODULE -->` the
public names of a module with their docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
sys.path.insert(0, str(HERE))
import pictures  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures."""
    for name, draw in pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=draw()))
    for path in sorted(RESULTS.glob("*.svg")):
        content = path.read_text(encoding="utf-8")
        files.append(File.generated(config, f"results/{path.name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what a page asks for."""
    markdown = re.sub(r"<!-- results: (\S+) -->", lambda found: results(found[1]), markdown)
    return re.sub(r"<!-- api: (\S+) -->", lambda found: api(found[1]), markdown)


def results(name: str) -> str:
    """A page of results, its title one level down, its pictures where the site has them."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    text = re.sub(r"^#", "##", text, flags=re.MULTILINE)
    return re.sub(r"\]\((?!http)([\w.-]+\.svg)\)", r"](results/\1)", text)


def api(module_name: str) -> str:
    """Markdown of a module's public names, in their order."""
    module = importlib.import_module(module_name)
    parts = [f"## `{module_name}`\n\n{_prose(module)}"]
    for name in _public(module):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            parts.append(
                f"### `{name}`\n\n```text\n{name}{_signature(value)}\n```\n\n{_prose(value)}"
            )
    return "\n\n".join(parts)


def _public(module: Any) -> list[str]:
    """What a module names, or what it defines without an underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return [n for n, v in own.items() if getattr(v, "__module__", None) == module.__name__]


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    # Annotations make lines that nobody reads; the prose has shapes and dtypes.
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return text if len(text) < 90 else text.replace(", ", ",\n    ").replace("(", "(\n    ", 1)


def _prose(value: Any) -> str:
    """A docstring as Markdown: indented formulas as code, sections in bold."""
    text = inspect.cleandoc(value.__doc__ or "")
    text = re.sub(r"^(Args|Returns|Raises|Attributes):$", r"**\1**\n", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\w[\w, ]*): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return text.replace("<", "&lt;") if "`<" not in text else text
