import io
import json

from rich.console import Console

from flex.config import RunConfig
from flex.data.loader import load_data
from flex.data.show import padding, show_bundle
from tests.flex.tiny_tokenizer import byte_tokenizer


def shown(tmp_path, *, colour=False, n=1, **data):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "[bold]p" * (1 + i), "completion": "c[/x]"} for i in range(12)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = {"on_bad_row": "skip", "validation_path": str(path), **data}
    cfg = RunConfig(data={"name": "jsonl", "path": str(path), **data}, train={"batch_size": 4})
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, color_system="truecolor" if colour else None)
    bundle = load_data(cfg, byte_tokenizer())
    show_bundle(bundle, cfg, byte_tokenizer(), n, console)
    return out.getvalue(), bundle, cfg


def test_without_colour_the_runs_are_titled_and_eos_is_visible(tmp_path):
    text, _, _ = shown(tmp_path)
    assert text.startswith(
        "=== rows.jsonl:1: 13 tokens, 6 bear loss ===\n"
        "--- no loss, 7 tokens ---\n[bold]p\n"
        "--- loss, 6 tokens ---\nc[/x]</s>\n"
    )
    assert "\x1b" not in text


def test_with_colour_loss_is_green_and_the_prompt_dim(tmp_path):
    text, _, _ = shown(tmp_path, colour=True)
    assert "\x1b[2m[bold]p" in text and "\x1b[32mc[/x]" in text
    assert "\x1b[7;32m</s>" in text


def test_cut_and_dropped_rows_are_told(tmp_path):
    text, bundle, _ = shown(tmp_path, max_length=10, n=9)
    assert "=== rows.jsonl:1: 10 tokens, 3 bear loss, CUT at data.max_length, no EOS ===" in text
    assert "c[/\n" in text and "</s>" not in text
    assert "  dropped rows.jsonl:2: no target tokens" in text
    assert f"account: {bundle.ledger.summary()}\n" in text


def test_lengths_and_share_of_loss_tokens(tmp_path):
    text, bundle, _ = shown(tmp_path)
    assert "examples: 12 train, 12 validation\n" in text
    # Lengths are 13, 20, ..., 90: 12 of them.
    assert "tokens per example: min 13, p50 48, p90 83, p95 90, p99 90, max 90\n" in text
    assert f"tokens that bear loss: 72 of {sum(range(13, 91, 7))} (11.7%)\n" in text
    histogram = [line.split() for line in text.splitlines() if line.endswith("#")]
    assert sum(int(count) for _, count, _ in histogram) == len(bundle.train)


def test_padding_by_layout(tmp_path):
    _, bundle, cfg = shown(tmp_path)
    counts = padding(bundle.train, cfg)
    real = sum(len(example.input_ids) for example in bundle.train)
    assert counts["packed"] == (real, 0)
    assert counts["fixed"] == (12 * 512, 12 * 512 - real)
    computed, lost = counts["grouped"]
    assert computed == real + lost and 0 < lost < counts["fixed"][1]
