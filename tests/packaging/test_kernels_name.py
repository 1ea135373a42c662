"""`import kernels` never finds our folder, and transformers' BLIP works beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT, ROOT / "kernels", ROOT / "kernels" / "src", ROOT / "tests"]

FIND = """
import importlib.util
spec = importlib.util.find_spec("kernels")
places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
print("|".join(str(place) for place in places))
"""

GENERATE = """
import torch
from transformers import BlipConfig, BlipForConditionalGeneration
from transformers.utils.import_utils import is_kernels_available
assert not is_kernels_available() or __import__("kernels").__file__, "took our folder for theirs"
text = dict(vocab_size=50, hidden_size=16, encoder_hidden_size=16, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=2, projection_dim=8, bos_token_id=1,
            sep_token_id=2, pad_token_id=0, eos_token_id=2)
vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
              image_size=32, patch_size=16, projection_dim=8)
torch.manual_seed(0)
config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
model = BlipForConditionalGeneration(config).eval()
out = model.generate(pixel_values=torch.randn(1, 3, 32, 32), max_length=6)
print("generated", tuple(out.shape))
"""


def run(code: str, cwd: Path, python: str = sys.executable) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [python, "-c", code], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def is_editable() -> bool:
    import blipfast

    return Path(blipfast.__file__).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: str(f.relative_to(ROOT)))
def test_kernels_is_never_ours(folder: Path) -> None:
    if not is_editable():
        pytest.fail("run the tests on an editable install: pip install -e .")
    assert str(ROOT) not in run(FIND, folder)


def test_kernels_is_never_ours_elsewhere(tmp_path: Path) -> None:
    assert str(ROOT) not in run(FIND, tmp_path)
    assert str(ROOT) not in run(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{FIND}", tmp_path)


def test_the_guard_lets_the_real_package_through(tmp_path: Path) -> None:
    real = tmp_path / "kernels"
    real.mkdir()
    (real / "__init__.py").write_text("theirs = True\n")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import kernels, blipfast.kernels\nprint(kernels.theirs, blipfast.kernels.__name__)"
    )
    assert run(code, ROOT) == "True blipfast.kernels"


def test_the_guard_hides_nothing_else() -> None:
    code = "import importlib.util as u; print(u.find_spec('scripts') is not None)"
    assert run(code, ROOT) == "True"


def test_our_kernels_refuse_another_name() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'kernels')!r})\nimport src"
    with pytest.raises(AssertionError, match=r"import them as 'blipfast\.kernels'"):
        run(code, ROOT)


def test_transformers_blip_generates_from_the_root() -> None:
    assert run(GENERATE, ROOT).startswith("generated (1, ")


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a new environment that has the wheel, and torch from this one."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    skip = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "__pycache__", "tests", ".*")
    shutil.copytree(ROOT, source, ignore=skip)
    wheel_dir = place / "dist"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheel_dir), str(source)]
    # The build of the library has its own test; without it this one is quick.
    env = {**os.environ, "BLIPFAST_NATIVE": "0"}
    subprocess.run([*pip, *build], check=True, env=env, timeout=300)
    venv.create(place / "env", with_pip=False)
    python = place / "env" / "bin" / "python"
    site = run("import sysconfig; print(sysconfig.get_path('purelib'))", place, str(python))
    (wheel,) = wheel_dir.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", site, str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    # A path line brings in what this environment has, but runs none of its `.pth` files.
    mine = run("import sysconfig; print(sysconfig.get_path('purelib'))", place)
    Path(site, "borrowed.pth").write_text(mine + "\n")
    return str(python)


@pytest.mark.slow
def test_the_wheel(wheel_python: str, tmp_path: Path) -> None:
    where = "import blipfast, blipfast.kernels; print(blipfast.kernels.__file__)"
    assert str(ROOT) not in run(where, tmp_path, wheel_python)
    package = Path(run("import blipfast; print(blipfast.__path__[0])", tmp_path, wheel_python))
    for config in (ROOT / "blipfast").rglob("*.yaml"):
        assert (package / config.relative_to(ROOT / "blipfast")).is_file(), config.name
    assert (package / "py.typed").is_file()
    for folder in (*FOLDERS[1:], tmp_path):
        assert str(ROOT) not in run(FIND, folder, wheel_python)
    # At the root Python itself sees an empty namespace; nothing of ours can be had through it,
    # and transformers passes it over.
    assert run(FIND, ROOT, wheel_python) in ("", f"None|{ROOT / 'kernels'}")
    with pytest.raises(AssertionError, match=r"import them as 'blipfast\.kernels'"):
        run("import kernels.src", ROOT, wheel_python)
    assert run(GENERATE, ROOT, wheel_python).startswith("generated (1, ")
