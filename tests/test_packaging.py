"""The wheel and the sdist: what is in them, and that the wheel works where nothing optional is."""

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fwpkm

ROOT = Path(__file__).parents[1]
PACKAGES = {"fwpkm": ROOT / "fwpkm", "fwpkm_vllm": ROOT / "integrations" / "vllm" / "fwpkm_vllm"}
OPTIONAL = ("datasets", "fla", "mkdocs", "pytest", "triton", "vllm")

# Run in the environment with the wheel: a name that is None in sys.modules cannot be imported.
WORKS = f"""
import sys
sys.modules |= dict.fromkeys({OPTIONAL})
import json
from importlib.metadata import distribution
import torch
import fwpkm, fwpkm_vllm
from fwpkm.collect_env import report

layer = fwpkm.layers.FwPKM(8, n_subkeys=12, key_dim=4, value_dim=4, config=fwpkm.MemoryConfig(chunk_size=4))
hidden, state, *_ = layer(torch.randn(1, 10, 8))
hidden.sum().backward()
print(json.dumps({{
    "files": [fwpkm.__file__, fwpkm_vllm.__file__],
    "version": distribution("fwpkm").version,
    "entry points": [[point.group, point.name, point.value] for point in distribution("fwpkm").entry_points],
    "learns": bool(layer.query.weight.grad.any()),
    "commits": state.memory.commits,
    "report": report(),
}}))
"""


def run(*command):
    return subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is made of it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out / f"fwpkm-{fwpkm.__version__}.tar.gz", out / f"fwpkm-{fwpkm.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel, which finds everything else where the tests do."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", built[1])
    return folder


def sources():
    """What the packages have in the repository."""
    return {
        f"{name}/{path.relative_to(folder)}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_the_packages_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    about = f"fwpkm-{fwpkm.__version__}.dist-info"
    assert {name for name in names if not name.startswith(about)} == sources()
    assert {f"{about}/licenses/LICENSE", f"{about}/entry_points.txt", f"{about}/METADATA"} <= names
    assert {"fwpkm/py.typed", "fwpkm_vllm/py.typed"} <= names


def test_the_sdist_has_the_sources(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {name.removeprefix("integrations/vllm/") for name in names if "fwpkm" in name} == sources()
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO"} <= names
    assert not any(name.startswith(("tests", "benchmarks", "docs")) for name in names)


def test_the_wheel_works_without_what_is_optional(installed):
    told = json.loads(run(installed / "bin" / "python", "-I", "-c", WORKS))
    assert all(Path(file).is_relative_to(installed) for file in told["files"])
    assert told["version"] == fwpkm.__version__
    assert {tuple(point) for point in told["entry points"]} == {
        ("console_scripts", "fwpkm", "fwpkm.cli:app"),
        ("vllm.general_plugins", "fwpkm", "fwpkm_vllm:register"),
        ("vllm.stat_logger_plugins", "fwpkm", "fwpkm_vllm.metrics:MemoryMetrics"),
    }
    assert told["learns"]
    assert told["commits"] == 2
    assert told["report"].startswith("```text\npython ")


def test_the_command_is_installed(installed):
    shown = run(installed / "bin" / "python", "-I", installed / "bin" / "fwpkm", "--help")
    assert all(command in shown for command in ("demo", "train", "doctor", "ask"))
