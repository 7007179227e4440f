"""Configurations in and out: overrides, suggestions, messages, round trips, presets, the hash."""

import random
import re

import pytest

from flex import yaml_io
from flex.config import PENALTY_PRESETS, OptimConfig, PenaltyConfig, RunConfig
from flex.config_io import config_hash, dump_config, flatten, load_config, origins
from flex.errors import ConfigError
from flex.options import OPTIONS, SECTIONS, suggest

# What a hurried person types, and what was meant.
MISTAKES = """
lr=optim.lr learning_rate=optim.lr optim.l=optim.lr optim.learningrate=optim.lr optim.LR=optim.lr
optimizer.lr=optim.lr train.lr=optim.lr weight_decay=optim.weight_decay
optim.weigth_decay=optim.weight_decay train.weight_decay=optim.weight_decay
optim.warmpu=optim.warmup
warmup=optim.warmup train.warmup=optim.warmup optim.beta=optim.betas betas=optim.betas
optim.clipnorm=optim.clip_norm clip_norm=optim.clip_norm max_grad_norm=optim.clip_norm
optim.min_lr=optim.min_lr_ratio optim.schedul=optim.schedule optim.nmae=optim.name
curvature.every=optim.curvature.every optim.curvature.evry=optim.curvature.every
optim.gamma=optim.curvature.gamma gamma=optim.curvature.gamma
optim.curvatur.gamma=optim.curvature.gamma optim.micro_batches=optim.curvature.micro_batches
lora.rank=lora.r rank=lora.r lora_r=lora.r lora.aplha=lora.alpha lora.alfa=lora.alpha
lora_alpha=lora.alpha lora.drop_out=lora.dropout dropout=lora.dropout lora.target=lora.targets
target_modules=lora.targets penalty.wieght=penalty.weight penalty.lambda=penalty.weight
penality.weight=penalty.weight penalty_weight=penalty.weight penalty.phi_lo=penalty.phi_low
penalty.phihigh=penalty.phi_high phi_low=penalty.phi_low penalty.threshhold=penalty.threshold
treshold=penalty.threshold penalty.scheduel=penalty.schedule penalty.exponet=penalty.exponent
penalty.one-sided=penalty.one_sided penalty.detach=penalty.detached
penalty.couplng=penalty.coupling penalty.transfrom=penalty.transform penalty.reduc=penalty.reduce
steps=train.steps
train.step=train.steps max_steps=train.steps optim.steps=train.steps train.epoch=train.epochs
epochs=train.epochs batch_size=train.batch_size train.batchsize=train.batch_size
train.batch=train.batch_size gradient_accumulation_steps=train.accumulation
train.acumulation=train.accumulation eval_every=train.eval_every train.eval_evry=train.eval_every
train.savevery=train.save_every train.kep=train.keep train.sample_promt=train.sample_prompt
model.nmae=model.name model.revison=model.revision dtype=model.dtype model.dtpye=model.dtype
model.attn=model.attention gradient_checkpointing=model.gradient_checkpointing data.pth=data.path
path=data.path data.validation=data.validation_path data.lang=data.language
data.dificulty=data.difficulty template=data.template data.losson=data.loss_on
max_length=data.max_length max_seq_length=data.max_length data.batchng=data.batching
limit=data.limit data.onbadrow=data.on_bad_row sed=seed train.seed=seed Seed=seed deepsped=deepspeed
train.deepspeed=deepspeed train.resume=resume output_dir=dir modle=model datta=data optimizer=optim
loar=lora
"""


def write(tmp_path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return str(file)


def complaint(overrides=(), path=None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert all((caught.value.what, caught.value.why, caught.value.fix))
    return caught.value


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.lr=1e-4", 1e-4),
        ("optim.lr=2E-5", 2e-5),
        ("optim.lr=1", 1.0),
        ("train.epochs=.5", 0.5),
        ("train.steps=010", 10),
        ("train.steps=null", None),
        ("train.sample_prompt=false", False),
        ("lora.targets=[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("lora.targets=[q_proj,1e4x]", ("q_proj", "1e4x")),
        ("optim.betas=[0.9,0.99]", (0.9, 0.99)),
        ("track=[]", ()),
        ("penalty.preset=off", "off"),
        ("name=1e4", "1e4"),
        ("name=no", "no"),
        ("name=null", "null"),
        ("model.name=a #b", "a #b"),
        ("data.path=a=b.jsonl", "a=b.jsonl"),
        ("data.path=[x", "[x"),
        ("data.path=null", None),
        ("model.name=C:\\x: y", "C:\\x: y"),
    ],
)
def test_an_override_is_read_as_meant(tmp_path, text, value):
    key, _, raw = text.partition("=")
    found = flatten(load_config(None, [text]))[key]
    assert (found, type(found)) == (value, type(value))
    if not OPTIONS[key].is_text:  # in a file the same text means the same
        *sections, name = key.split(".")
        lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate([*sections, name])]
        path = write(tmp_path, "\n".join(lines) + f" {raw}\n")
        assert flatten(load_config(path))[key] == value


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path):
    path = write(tmp_path, "seed: 3\noptim:\n  lr: 1e-3\n  warmup: 0.2\nlora: # nothing given\n")
    config = load_config(path, ["optim.lr=1e-4"])
    assert (config.seed, config.optim.lr, config.optim.warmup, config.lora.r) == (3, 1e-4, 0.2, 8)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
def test_an_empty_file_is_all_defaults(tmp_path, text):
    assert load_config(write(tmp_path, text)) == RunConfig() == load_config()


# -- mistakes --------------------------------------------------------------------------------------


def test_the_nearest_option_is_suggested_for_a_mistyped_key():
    pairs = [pair.split("=") for pair in MISTAKES.split()]
    assert len(pairs) >= 60
    wrong = [(typed, meant, suggest(typed)) for typed, meant in pairs if suggest(typed) != meant]
    assert len(wrong) <= 0.05 * len(pairs), wrong


@pytest.mark.parametrize(
    ("typed", "meant"), [("train.seed", "seed"), ("optim.steps", "train.steps")]
)
def test_the_right_name_below_a_wrong_section_is_recognised(typed, meant):
    assert suggest(typed) == meant


@pytest.mark.parametrize("key", ["zzz", "qwertyuiop", "foo.bar", "x", "", "."])
def test_nothing_is_suggested_when_nothing_is_near(key):
    assert suggest(key) is None


def test_every_option_is_near_itself_and_explained():
    assert [key for key in [*OPTIONS, *SECTIONS] if suggest(key) != key] == []
    assert [key for key, option in OPTIONS.items() if not option.description] == []


def test_an_unknown_key_names_the_place_and_the_nearest_option(tmp_path):
    error = complaint(["lr=1e-4"])
    assert "`lr`" in error.what and "command line" in error.what and "`optim.lr`" in error.fix
    path = write(tmp_path, "train:\n  stps: 3\n")
    error = complaint(path=path)
    assert "`train.stps`" in error.what and path in error.what and "`train.steps`" in error.fix


@pytest.mark.parametrize(
    ("override", "value", "allowed"),
    [
        ("lora.r=0", "0", "greater than or equal to 1"),
        ("lora.r=8.0", "8.0", "integer"),
        ("lora.r=true", "true", "integer"),
        ("lora.dropout=1", "1", "less than 1"),
        ("penalty.phi_low=1.5", "1.5", "less than or equal to 1"),
        ("penalty.phi_high=-0.1", "-0.1", "greater than or equal to 0"),
        ("penalty.threshold=0", "0", "greater than 0"),
        ("penalty.preset={a: 1}", "{'a': 1}", "'paper-literal'"),
        ("optim.name={a: 1}", "{'a': 1}", "'adamw'"),
        ("optim.lr=.inf", "inf", "finite"),
        ("optim.lr=.nan", "nan", "finite"),
        ("optim.betas=[0.9]", "[0.9]", "too few"),
        ("lora.targets=[]", "[]", "not have 0 items"),
        ("name=a/b", "a/b", "pattern"),
        ("name=", "null", "text"),
        ("train.steps=ten", "ten", "integer"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_is_allowed(override, value, allowed):
    error = complaint([override])
    assert override.partition("=")[0] in error.what
    assert value in error.what
    assert allowed in error.why


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["model.dtype=bf16"], "model.dtype=bfloat16"),
        (["optim.name=sofia"], "optim.name=sophia"),
        (["lora.targets=q_proj"], "lora.targets=[q_proj]"),
        (["track=wandb"], "track=[wandb]"),
        (["data=mbpp"], "data.name=mbpp"),
        (["seed"], "seed=VALUE"),
        (["--seed"], "seed=VALUE"),
        (["seed=1", "seed=2"], "keep one"),
        (["seed=["], "quote it"),
        (["penalty.preset=off", "penalty.weight=1"], "change one"),
        (["data.name=jsonl"], "change one"),
        (["penalty.target=delta_w"], "change one"),
    ],
)
def test_the_fix_says_what_to_type(overrides, fix):
    assert fix in complaint(overrides).fix


def test_several_wrong_values_are_all_named():
    what = complaint(["lora.r=0", "optim.lr=-1", "seed=x"]).what
    assert all(key in what for key in ("lora.r", "optim.lr", "seed"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("seed: 1\nseed: 2\n", "line 2: the key `seed` is given twice"),
        ("optim:\n  lr: 1\n  name: adamw\n  lr: 2\n", "line 4: the key `lr` is given twice"),
        ("- seed\n", "not a mapping"),
        ("seed\n", "not a mapping"),
        ("seed: [1\n", "line 2"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("seed: !!python/name:os.system\n", "tags"),
        ("1: 2\n", "the key 1 is not text"),
        ("optim: sophia\n", "`optim` is a section"),
        ("lora: [8]\n", "`lora` is a section"),
        ("seed: {a: 1}\n", "seed = {'a': 1}"),
        ("[" * 600, "nested too deeply"),
        ("seed: " + "9" * 5000, "digits"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, text, what):
    assert what in complaint(path=write(tmp_path, text)).what


def test_a_dotted_key_in_a_file_is_told_to_nest(tmp_path):
    error = complaint(path=write(tmp_path, "optim.lr: 1\n"))
    assert "no option `optim.lr`" in error.what and "nest it: `optim:`" in error.fix


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    write(tmp_path, "seed: 1\n")
    assert str(tmp_path / "run.yaml") in complaint(path=str(tmp_path / "rnu.yaml")).fix
    assert "mbpp-smollm2.yaml" in complaint(path="mbpp-smollm2").fix
    assert "mbpp-smollm2.yaml" in complaint(path="/nowhere/zzz.yaml").fix  # lists the recipes


def test_a_file_that_is_not_text(tmp_path):
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00seed")
    for path in (str(binary), str(tmp_path), "", "a\0b"):
        assert "cannot be read" in complaint(path=path).what


def test_five_hundred_mutated_files_never_raise_anything_else(tmp_path):
    rng = random.Random(0)
    lines = (
        "name: x\nseed: 3\ntrack: [tensorboard]\nmodel:\n  dtype: bfloat16\ndata:\n  name: mbpp\n"
        "lora:\n  r: 8\n  targets: [q_proj, v_proj]\npenalty:\n  preset: flex\n  weight: 0.02\n"
        "optim:\n  name: sophia\n  lr: 1e-4\n  betas: [0.9, 0.95]\n  curvature:\n    gamma: 0.05\n"
    ).splitlines()
    odd = [
        "",
        "~",
        "-1",
        "1e999",
        ".nan",
        "[]",
        "{}",
        "[[1]]",
        "{a: b}",
        "'",
        '"x',
        "&a",
        "*a",
        "!x",
    ]
    odd += [
        "yes",
        "0x10",
        "1:2",
        "null",
        "|",
        ">",
        "? x",
        "- -",
        "%",
        "@",
        "`",
        "\t",
        "\0",
        "e\u0301",
    ]
    accepted = refused = 0
    for _ in range(500):
        text = list(lines)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            match rng.randrange(6):
                case 0:
                    text.insert(at, text[rng.randrange(len(text))])
                case 1:
                    text[at] = text[at].partition(":")[0] + ": " + rng.choice(odd)
                case 2:
                    text[at] = " " * rng.randint(0, 4) + text[at].strip()
                case 3:
                    place = rng.randrange(len(text[at]) + 1)
                    text[at] = (
                        text[at][:place] + rng.choice("x:#[]{},&*!|>'\"%@` -") + text[at][place:]
                    )
                case 4:
                    text[at] = rng.choice(odd) + text[at]
                case 5 if len(text) > 1:
                    del text[at]
        path = write(tmp_path, "\n".join(text))
        try:
            assert isinstance(load_config(path), RunConfig)
            accepted += 1
        except ConfigError as error:
            assert all((error.what, error.why, error.fix))
            refused += 1
    assert accepted > 25 and refused > 200


# -- presets, round trip, hash, origins ------------------------------------------------------------


@pytest.mark.parametrize("preset", PENALTY_PRESETS)
def test_a_preset_sets_what_is_not_given(preset):
    penalty = load_config(None, [f"penalty.preset={preset}"]).penalty
    for name, value in PENALTY_PRESETS[preset].items():
        assert getattr(penalty, name) == value
    assert penalty.active == (preset != "off")
    if preset != "off":
        given = load_config(None, [f"penalty.preset={preset}", "penalty.norm=mean"]).penalty
        assert given.norm == "mean"


def random_config(rng: random.Random) -> RunConfig:
    choices = {
        "name": ["1e-4", "null", "x", "007"],
        "track": ["[]", "[wandb,mlflow]"],
        "model.name": ["a: b", "#x", "- y", "off", "12", "true", "'q'", "x" * 150, "two words"],
        "data.path": ["null", "~/x y.jsonl", "1e5"],
        "lora.targets": ["[a]", "['1', 'null', 'b c']"],
        "penalty.preset": ["flex", "paper-literal", "repo-compat", "off"],
        "penalty.phi_low": ["0", "1", "0.123456789012345"],
        "optim.name": ["sophia", "adamw", "lion"],
        "optim.lr": ["1e-4", "1e-12", "3", "null", "0.1"],
        "train.steps": ["null", "7"],
        "train.sample_prompt": ["true", "false"],
    }
    picked = rng.sample(sorted(choices), rng.randint(0, len(choices)))
    return load_config(None, [f"{key}={rng.choice(choices[key])}" for key in picked])


def test_a_dump_loads_back_as_an_equal_configuration(tmp_path):
    rng = random.Random(1)
    for _ in range(60):
        config = random_config(rng)
        again = load_config(write(tmp_path, dump_config(config)))
        assert again == config
        assert config_hash(again) == config_hash(config)


def test_the_hash_covers_the_maths_and_nothing_else():
    base = config_hash(RunConfig())
    assert re.fullmatch("[0-9a-f]{64}", base)
    same = ["name=b", "dir=elsewhere", "track=[wandb]", "resume=never", "train.keep=9"]
    same += ["train.log_every=7", "train.save_every=5", "penalty.weight=0.02", "optim.lr=3e-4"]
    same += ["data.path=elsewhere.jsonl"]
    for override in same:
        assert config_hash(load_config(None, [override])) == base, override
    for key in ["seed=1", "optim.lr=2e-4", "lora.r=4", "penalty.weight=0", "train.steps=5"]:
        assert config_hash(load_config(None, [key])) != base, key
    off, zero = (load_config(None, [t]) for t in ("penalty.preset=off", "penalty.weight=0"))
    assert config_hash(off) == config_hash(zero)


def test_origins(tmp_path):
    path = write(
        tmp_path, "penalty:\n  preset: paper-literal\n  norm: mean\noptim: {lr: null, warmup: 0}\n"
    )
    rows = {row.key: row for row in origins(path, ["seed=5", "optim.warmup=0.5"])}
    assert list(rows) == list(OPTIONS)
    found = {
        key: (rows[key].value, rows[key].origin)
        for key in ("seed", "optim.warmup", "optim.lr", "penalty.norm", "penalty.target", "lora.r")
    }
    assert found == {
        "seed": (5, "override"),
        "optim.warmup": (0.5, "override"),
        "optim.lr": (3e-4, "default"),
        "penalty.norm": ("mean", "file"),
        "penalty.target": ("factors", "preset"),
        "lora.r": (8, "default"),
    }


@pytest.mark.parametrize("value", ["off", "1e-4", "1:30", "010", "~", "", " x ", "a\nb", "\u00e9"])
def test_text_survives_yaml(value):
    assert yaml_io.parse(yaml_io.dump({"k": value, "l": (value,)})) == {"k": value, "l": [value]}


@pytest.mark.parametrize(
    ("options", "gamma"),
    [
        ([], 0.002),
        (["penalty.preset=off"], 5.0),
        (["penalty.weight=0"], 5.0),
        (["penalty.coupling=decoupled"], 5.0),
        (["penalty.preset=repo-compat"], 5.0),
        (["penalty.preset=paper-literal"], 0.002),
        (["optim.curvature.gamma=0.3"], 0.3),
        (["penalty.preset=off", "optim.curvature.gamma=0.3"], 0.3),
        (["optim.name=adamw"], 0.002),
    ],
    ids=str,
)
def test_gamma_depends_on_what_the_denominator_holds(options, gamma):
    assert load_config(None, options).optim.curvature.gamma == gamma


def test_gamma_is_filled_in_a_configuration_made_of_sections():
    config = RunConfig(penalty=PenaltyConfig(preset="off"), optim=OptimConfig(lr=1e-3))
    assert config.optim.curvature.gamma == 5.0 and config.optim.lr == 1e-3
    assert RunConfig().optim.curvature.gamma == 0.002
