"""No line of the project loads pickles, trusts remote code, evaluates text or starts a shell."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MAY_EXECUTE = {
    "flex/data/check_child.py",  # the child process that runs the built-in tasks' tests
    "flex/evals/inside/python.py",  # inside the sandbox
}
MAY_LOAD_YAML = {"flex/yaml_io.py", "flex/data/builtin.py"}  # by a SafeLoader, see the test

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
# torch.distributed's *_object* collectives pickle
CALLS = {
    "torch.load": "torch.load unpickles",
    "torch.save": "torch.save pickles",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "subprocess.getoutput": "starts a shell",
    "subprocess.getstatusoutput": "starts a shell",
}
OBJECT_COLLECTIVES = {
    *("all_gather_object", "gather_object", "broadcast_object_list"),
    *("scatter_object_list", "send_object_list", "recv_object_list"),
}


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def unsafe(code: str, path: str = "flex/x.py") -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        found = ""
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            if names & PICKLES:
                found = "imports a pickle module"
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module or "").split(".")[0] in PICKLES:
                found = "imports a pickle module"
            elif {f"{node.module}.{name}" for name in names} & CALLS.keys():
                found = "imports an unsafe call"
            elif names & OBJECT_COLLECTIVES:
                found = "imports a collective that pickles"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2]
            if name in CALLS:
                found = CALLS[name]
            elif name in ("eval", "exec", "builtins.eval", "builtins.exec"):
                found = "" if path in MAY_EXECUTE else "evaluates text"
            elif last in OBJECT_COLLECTIVES:
                found = "a collective that pickles"
            elif name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                loader = [dotted(key.value) for key in node.keywords if key.arg == "Loader"]
                safe = path in MAY_LOAD_YAML or (loader and loader[0].endswith("SafeLoader"))
                found = "" if safe else "YAML that can build objects"
        elif isinstance(node, ast.keyword):
            if node.arg in ("trust_remote_code", "shell", "allow_pickle") and not is_false(
                node.value
            ):
                found = f"{node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if "trust_remote_code" in keys:
                found = "trust_remote_code in a dict"
        if found:
            yield f"{path}:{getattr(node, 'lineno', '?')}: {found}"


def test_nothing_unsafe_in_the_project():
    files = [
        path
        for folder in ("flex", "kernels", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 10
    found = [
        problem
        for path in (*files, ROOT / "setup.py")
        for problem in unsafe(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "torch.distributed.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "Model.from_pretrained(x, trust_remote_code=True)",
        "Model.from_pretrained(x, trust_remote_code=cfg.trust)",
        "Model.from_pretrained(x, **{'trust_remote_code': True})",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "eval('1')",
        "exec(code)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_each_unsafe_thing_is_seen(code):
    assert len(list(unsafe(code))) == 1


@pytest.mark.parametrize("path", sorted(MAY_LOAD_YAML))
def test_our_yaml_loaders_are_safe_loaders(path):
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert issubclass(module._Loader, yaml.SafeLoader | yaml.CSafeLoader)


def test_safe_twins_pass():
    code = (
        "model.eval()\nimport re\nre.compile('x')\nsubprocess.run(['ls'], shell=False)\n"
        "Model.from_pretrained(x, trust_remote_code=False)\nsafetensors.torch.load_file(f)\n"
        "json.load(f)\nnp.load(f)\nyaml.safe_load(t)\nyaml.load(t, Loader=yaml.CSafeLoader)"
    )
    assert list(unsafe(code)) == []
