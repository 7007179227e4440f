"""What the documents say exists, exists; what they show to be typed, runs."""

import argparse
import json
import re
import shlex

import pytest
import torch
from torch.nn.functional import cross_entropy

from flex.commands import _parser
from flex.options import OPTIONS, SECTIONS
from flex.train import main
from tests.runs import ROOT
from tests.tiny import VOCAB, tiny_model

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
README = (ROOT / "README.md").read_text()
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def code(text):
    """Everything in backticks or fences."""
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    return fenced, re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_files_that_are_named_exist(path):
    fenced, inline = code(path.read_text())
    words = [word for piece in (*fenced, *inline) for word in re.split(r"[\s=(),|]+", piece)]
    wanted = {
        w for w in words if re.fullmatch(r"(flex|kernels|tests|benchmarks|ds_configs)/[\w./-]*", w)
    }
    missing = {w for w in wanted if not (ROOT / w.rstrip(".")).exists()}
    assert missing == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_options_that_are_named_exist(path):
    fenced, inline = code(path.read_text())
    known = "|".join(sorted(s for s in SECTIONS if "." not in s))
    found = {
        match
        for piece in (*fenced, *inline)
        for match in re.findall(rf"(?<![\w./])((?:{known})\.[a-z_.]+)(?=[=`\s,]|$)", piece)
    }
    assert {name for name in found if name not in OPTIONS and name not in SECTIONS} == set()


def test_commands_that_are_shown_parse():
    fenced, inline = code(README)
    lines = [line for piece in (*fenced, *inline) for line in piece.splitlines()]
    commands = [line for line in lines if line.startswith("python -m flex ")]
    assert len(commands) >= 4
    for line in commands:
        words = shlex.split(line.replace("<name>", "x"), comments=True)[3:]
        try:
            _parser().parse_known_args(words)
        except SystemExit:
            pytest.fail(f"not a command: {line}")
    assert isinstance(_parser(), argparse.ArgumentParser)


LAUNCHES = sorted(
    {
        line.partition("#")[0].strip()
        for path in DOCUMENTS
        for piece in code(path.read_text())[0]
        for line in piece.splitlines()
        if line.startswith("deepspeed ") and "flex/train.py" in line
    }
)


def test_the_four_ways_to_train_a_7b_are_documented():
    ways = [line for line in LAUNCHES if re.match(r"deepspeed --(num_gpus|hostfile)", line)]
    assert len(ways) >= 4
    for word in ("quantise=nf4", "num_gpus 1 ", "zero3.json", "--hostfile"):
        assert any(word in line for line in ways), word


@pytest.mark.parametrize("line", LAUNCHES)
def test_launches_that_are_shown_pass_the_dry_run(line, tmp_path, monkeypatch, capsys):
    """As typed, but for the model's weights and the data, which a test must not fetch."""
    monkeypatch.chdir(ROOT)
    launcher, _, arguments = line.partition("flex/train.py")
    slots = re.findall(r"slots=(\d+)", (ROOT / "ds_configs/README.md").read_text())
    given = re.search(r"--num_gpus (\d+)", launcher)
    world = int(given[1]) if given else sum(map(int, slots)) if "--hostfile" in launcher else 2
    task = {"text": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1)"]}
    rows = tmp_path / "rows.jsonl"
    numbers = (*range(511, 531), *range(601, 641))  # MBPP's own cut
    rows.write_text("".join(json.dumps(task | {"task_id": n}) + "\n" for n in numbers))
    shape = "codellama-7b" if "codellama" in arguments else "tiny"
    own = (f"model.name=shape:{shape}", f"data.path={rows}", f"dir={tmp_path / 'runs'}")
    status = main([*shlex.split(arguments), "--dry-run", "--world", str(world), *own])
    found = capsys.readouterr()
    assert status == 0, found.err
    assert "checks passed" in found.out and f"{world} process" in found.out
    assert "ok           adapters" in found.out
    assert not (tmp_path / "runs").exists()


def test_the_two_loops_of_the_readme_train():
    """The snippets themselves, with a model, logits and a loss put in the place of the dots."""
    from peft import LoraConfig, get_peft_model

    snippets = [s for s in code(README)[0] if "from flex." in s]
    assert len(snippets) == 2
    config = LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(tiny_model(), config)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))

    def forward():
        logits = peft_model(input_ids=ids).logits[0, :-1]
        return logits, cross_entropy(logits, ids[0, 1:])

    space = {"peft_model": peft_model, "parameters": parameters, "torch": torch}
    space["cross_entropy"] = cross_entropy
    penalty_start, penalty_step = snippets[0].split("...")
    sophia_start, refresh = snippets[1].split("...")
    exec(penalty_start + sophia_start, space)
    losses = []
    for step in range(12):
        if step % 10 == 0:
            space["logits"] = forward()[0]
            exec(refresh, space)
        logits, loss = forward()
        space.update(logits=logits, loss=loss)
        exec(penalty_step, space)
        space["optimizer"].step()
        space["optimizer"].zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert space["penalty"].last_report.value > 0
