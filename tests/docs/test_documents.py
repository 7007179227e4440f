"""What the documents say exists, exists; what they show to be typed, runs."""

import argparse
import re
import shlex

import pytest
import torch
from torch.nn.functional import cross_entropy

from flex.commands import _parser
from flex.options import OPTIONS, SECTIONS
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
