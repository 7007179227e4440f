"""The folder `kernels/` beside Hugging Face's package of that name; the direction of imports."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
THEIRS = {"datasets", "tokenizers", "evaluate", "peft", "accelerate", "triton", "torch"}


def sources(*folders: str) -> Iterator[Path]:
    """Python files below the folders; through flex/kernels nothing is visited twice."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] != ("flex", "kernels"):
                yield relative


def module_name(path: Path) -> str:
    parts = ("flex", *path.parts) if path.parts[0] == "kernels" else path.parts
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


def imported(path: Path, code: str) -> set[str]:
    """Absolute names of all that a file imports, also inside functions. `from a import b` gives a
    and a.b, since b may be a module."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def wrong_direction(path: Path, code: str) -> set[str]:
    """The imports of a file that the layering forbids."""
    module = module_name(path)
    names = imported(path, code)
    bad = {name for name in names if inside(name, "benchmarks", "tests", "kernels")}
    if inside(module, "flex.kernels"):
        bad |= {
            n for n in names if inside(n, "flex") and n != "flex" and not inside(n, "flex.kernels")
        }
    if inside(module, "flex.model", "flex.optim", "flex.penalty"):
        bad |= {n for n in names if inside(n, "flex.step", "flex.loop", "flex.train")}
    return bad


def test_imports_run_one_way():
    found = {
        str(path): bad
        for path in sources("flex", "kernels")
        if (bad := wrong_direction(path, (ROOT / path).read_text("utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("path", "code", "bad"),
    [
        ("kernels/x/api.py", "from flex.errors import FlexError", "flex.errors"),
        ("kernels/x/api.py", "from ...config import RunConfig", "flex.config"),
        ("kernels/x/__init__.py", "from ... import state", "flex.state"),
        ("kernels/x/api.py", "from ..runtime import choose", None),
        ("kernels/x/__init__.py", "from .api import x", None),
        ("flex/optim/a.py", "def f():\n    import flex.step", "flex.step"),
        ("flex/penalty.py", "from .loop import run", "flex.loop"),
        ("flex/model/base.py", "from flex import train", "flex.train"),
        ("flex/model/base.py", "from flex.kernels.lora_linear import lora_linear", None),
        ("flex/loop.py", "from . import step", None),
        ("flex/loop.py", "from kernels.lora_linear import lora_linear", "kernels.lora_linear"),
        ("flex/loop.py", "import tests.tiny", "tests.tiny"),
        ("flex/loop.py", "import benchmarks", "benchmarks"),
    ],
)
def test_a_wrong_import_is_seen(path, code, bad):
    found = wrong_direction(Path(path), code)
    assert bad in found if bad else found == set()


def test_no_module_of_ours_shadows_another():
    # `deepspeed flex/train.py` puts flex/ first on sys.path: each name here could hide a package
    names = {path.stem for path in (ROOT / "flex").iterdir()} - {
        "__init__",
        "__main__",
        "__pycache__",
    }
    assert len(names) > 5
    assert names & (sys.stdlib_module_names | THEIRS) == set()


def test_the_kernels_folder_is_no_package_of_its_own():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "flex/kernels").is_symlink()
    assert os.readlink(ROOT / "flex/kernels") == "../kernels"


PROBE = """
import json, sys
found = {}
for name in sys.argv[1:]:
    found[name] = __import__(name, fromlist=["_"]).__file__
try:
    import kernels
    found["kernels"] = getattr(kernels, "MARK", None)
except ImportError:
    found["kernels"] = "absent"
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("other", "place"), [("absent", "tmp"), ("before", "root"), ("after", "tmp")]
)
def test_flex_kernels_is_ours_beside_hugging_faces_kernels(tmp_path, other, place):
    fake = tmp_path / "site"
    (fake / "kernels").mkdir(parents=True)
    (fake / "kernels/__init__.py").write_text("MARK = 'theirs'\n")
    path = {"absent": [ROOT], "before": [fake, ROOT], "after": [ROOT, fake]}[other]
    ours = sorted(
        f"flex.kernels.{init.parent.name}" for init in (ROOT / "kernels").glob("*/__init__.py")
    )
    assert ours
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *ours],
        cwd=ROOT if place == "root" else tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    mark = found.pop("kernels")
    if other != "absent":  # a regular package wins over our folder, wherever it stands on the path
        assert mark == "theirs"
    assert sorted(found) == ours
    for name, file in found.items():
        assert Path(file).resolve().is_relative_to(ROOT / "kernels" / name.rpartition(".")[2])


def test_transformers_does_not_take_our_folder_for_its_package():
    # from the root, `kernels` is findable as a namespace package
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlib.metadata as m, importlib.util as u\n"
            "from transformers.utils import is_kernels_available\n"
            "assert u.find_spec('kernels') is not None\n"
            "installed = any(d.name == 'kernels' for d in m.distributions())\n"
            "assert installed or not is_kernels_available()\n"
            "import transformers.integrations.hub_kernels",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
