import json
import sys
from types import SimpleNamespace

import pytest

from flex.config import DataConfig
from flex.data.reading import MAX_CHARACTERS
from flex.data.rows import MAX_VALIDATION, Row, load_rows, split_by_hash
from flex.errors import DataError


def pair(i, **fields):
    return {"id": i, "prompt": f"prompt {i}", "completion": f"completion {i}", **fields}


def line(obj):
    return json.dumps(obj).encode() + b"\n"


def write(path, rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else line(row) for row in rows))
    return str(path)


def jsonl(path, rows, **options):
    return DataConfig(name="jsonl", path=write(path, rows), **options)


def mbpp_task(task_id):
    return {
        "task_id": task_id,
        "text": f"Write {task_id}.",
        "code": f"def f():\r\n    return {task_id}",
        "test_list": [f"assert f() == {task_id}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def ids(rows):
    return [row.id for row in rows]


# Reason, offending line (None stands for a good row), and what the message says about it.
DAMAGE = {
    "bad_utf8": ("not UTF-8", b'{"prompt": "a\xff", "completion": "b"}\n', "0xff"),
    "utf16": (
        "NUL character",
        '{"prompt": "a", "completion": "b"}'.encode("utf-16-le") + b"\n",
        "byte 1",
    ),
    "half_json": ("not JSON", b'{"prompt": "a", "comple\n', "character 16"),
    "two_objects": ("not JSON", b'{"prompt": "a"} {"completion": "b"}\n', "Extra data"),
    "deep_nesting": ("not JSON", b"[" * 200_000 + b"\n", "nested"),
    "huge_integer": ("not JSON", b'{"id": ' + b"9" * 5000 + b"}\n", "digits"),
    "missing_key": (
        "missing key",
        line({"prompt": "a", "completions": "b"}),
        "did you mean `completions`",
    ),
    "list_line": ("wrong type", b'["a", "b"]\n', "the line is a list"),
    "number": ("wrong type", line(pair(2, completion=3)), "`completion` is a number"),
    "nested_null": ("wrong type", line(pair(2, prompt={"text": None})), "`prompt` is an object"),
    "null": ("wrong type", line(pair(2, prompt=None)), "`prompt` is null"),
    "float_id": ("wrong type", line(pair(2.5)), "`id`"),
    "empty": ("empty field", line(pair(2, completion="")), "`completion`"),
    "blank": ("empty field", line(pair(2, prompt=" \n\t")), "`prompt`"),
    "blank_line": ("blank line", b"\r\n", "middle"),
    "raw_nul": ("NUL character", b'{"prompt": "a\0", "completion": "b"}\n', "byte 13"),
    "escaped_nul": ("NUL character", line(pair(2, prompt="a\0b")), "character 1 of `prompt`"),
    "half_a_surrogate_pair": ("lone surrogate", line(pair(2, prompt="ab\ud83d")), "character 2"),
    "ten_megabytes": ("too large", line(pair(2, prompt="x" * 10_000_000)), "10000000 characters"),
    "duplicate_id": ("duplicate id", line(pair(1, prompt="other")), "jsonl:1 was rows.jsonl:2"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_that_names_file_line_and_reason(tmp_path, kind):
    reason, bad, detail = DAMAGE[kind]
    cfg = jsonl(tmp_path / "rows.jsonl", [pair(0), pair(1), bad, pair(3)])
    with pytest.raises(DataError) as caught:
        load_rows(cfg)
    assert "1 of 4 rows" in caught.value.what
    assert f"rows.jsonl:3: {reason}: " in caught.value.what
    assert detail in caught.value.what
    assert "data.on_bad_row=skip" in caught.value.fix


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_counted_when_skipped_and_costs_no_other_row(tmp_path, kind):
    reason, bad, _ = DAMAGE[kind]
    rows = [pair(0), pair(1), bad, *(pair(i) for i in range(3, 100))]
    loaded = load_rows(jsonl(tmp_path / "rows.jsonl", rows, on_bad_row="skip"))
    assert loaded.ledger.dropped == {reason: 1}
    assert str(loaded.ledger.first(reason)[0]).startswith("rows.jsonl:3: ")
    assert loaded.ledger.read == 100
    kept = {row.id for row in loaded.train + loaded.validation}
    assert kept == {f"jsonl:{i}" for i in range(100) if i != 2}


@pytest.mark.parametrize(
    ("head", "end"),
    [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"\xef\xbb\xbf", b"\r\n\r\n\n  \n")],
)
def test_byte_order_mark_crlf_and_blank_end_are_tolerated(tmp_path, head, end):
    lines = [head + line(pair(0))[:-1] + end[:2].lstrip(b" "), line(pair(1))[:-1] + end]
    loaded = load_rows(jsonl(tmp_path / "rows.jsonl", lines))
    assert sorted(ids(loaded.train + loaded.validation)) == ["jsonl:0", "jsonl:1"]
    assert loaded.ledger.read == 2 and not loaded.ledger.drops
    assert {row.text for row in loaded.train + loaded.validation} == {"prompt 0", "prompt 1"}


def test_line_ends_inside_strings_are_kept(tmp_path):
    rows = load_rows(jsonl(tmp_path / "rows.jsonl", [pair(0, prompt="a\r\nb\u2028c")])).train
    assert rows == [Row("pair", "jsonl:0", "rows.jsonl:1", "a\r\nb\u2028c", "completion 0")]


def test_the_first_five_of_all_kinds_are_named_and_all_are_counted(tmp_path):
    damage = [bad for reason, bad, _ in DAMAGE.values() if reason != "duplicate id"]
    good = [pair(i) for i in range(3000)]
    rows = [
        row for i in range(0, 3000, 100) for row in [*good[i : i + 100], *damage[i // 100 :][:1]]
    ]
    with pytest.raises(DataError) as caught:
        load_rows(jsonl(tmp_path / "rows.jsonl", rows))
    named = [row.split(":")[1] for row in caught.value.what.splitlines()[1:]]
    assert named == ["101", "202", "303", "404", "505"]
    ledger = load_rows(jsonl(tmp_path / "rows.jsonl", rows, on_bad_row="skip")).ledger
    assert ledger.read == 3000 + len(damage)
    assert ledger.dropped.total() == len(damage)
    assert ledger.dropped["wrong type"] == 5 and ledger.dropped["NUL character"] == 3


def test_skipping_refuses_above_one_percent(tmp_path):
    rows = [pair(i) for i in range(300)]
    rows[10:13] = [b"{\n"] * 3
    assert (
        load_rows(jsonl(tmp_path / "a.jsonl", rows, on_bad_row="skip")).ledger.dropped.total() == 3
    )
    rows[20] = b"{\n"
    with pytest.raises(DataError, match="4 of 300 rows") as caught:
        load_rows(jsonl(tmp_path / "b.jsonl", rows, on_bad_row="skip"))
    assert "1%" in caught.value.why


def test_a_file_of_another_kind_is_told_as_such(tmp_path):
    with pytest.raises(DataError) as caught:
        load_rows(jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}]))
    assert "not one row" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(DataError, match="no training row"):
        load_rows(jsonl(tmp_path / "rows.jsonl", [content]))


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path):
    write(tmp_path / "mbpp.jsonl", [pair(0)])
    for path, fix in (
        (tmp_path / "mbp.jsonl", f"did you mean {tmp_path / 'mbpp.jsonl'}?"),
        (tmp_path, f"did you mean {tmp_path / 'mbpp.jsonl'}?"),
        (tmp_path / "nowhere" / "mbpp.jsonl", "set data.path=FILE.jsonl"),
        (tmp_path / "zzz", "set data.path=FILE.jsonl"),
    ):
        with pytest.raises(DataError) as caught:
            load_rows(DataConfig(name="jsonl", path=str(path)))
        assert str(path) in caught.value.what
        assert fix in caught.value.fix


def test_mbpp_splits_by_task_id_and_never_uses_the_test_tasks(tmp_path):
    tasks = [mbpp_task(i) for i in range(1, 975)]
    loaded = load_rows(DataConfig(name="mbpp", path=write(tmp_path / "m.jsonl", tasks)))
    assert ids(loaded.train) == [f"mbpp:{i}" for i in range(601, 975)]
    assert ids(loaded.validation) == [f"mbpp:{i}" for i in range(511, 601)]
    assert loaded.ledger.set_aside == {"test and few-shot tasks": 510}
    assert loaded.train[0].tests == ("assert f() == 601",)
    assert loaded.train[0].origin == "m.jsonl:601"


def test_a_validation_file_of_mbpp_cannot_smuggle_in_other_splits(tmp_path):
    both = write(tmp_path / "m.jsonl", [mbpp_task(i) for i in (11, 511, 601)])
    loaded = load_rows(DataConfig(name="mbpp", path=both, validation_path=both))
    assert (ids(loaded.train), ids(loaded.validation)) == (["mbpp:601"], ["mbpp:511"])
    assert loaded.ledger.set_aside == {
        "test and few-shot tasks": 2,
        "validation": 1,
        "train": 1,
    }


def test_mbpp_without_training_tasks_is_an_error(tmp_path):
    path = write(tmp_path / "m.jsonl", [mbpp_task(i) for i in range(11, 21)])
    with pytest.raises(DataError, match="no training row"):
        load_rows(DataConfig(name="mbpp", path=path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"task_id": "601"}, "wrong type"),
        ({"task_id": True}, "wrong type"),
        ({"test_list": "assert f()"}, "wrong type"),
        ({"test_list": ["assert f()", None]}, "wrong type: `test_list[1]` is null"),
        ({"test_list": [""]}, "empty field"),
    ],
)
def test_mbpp_fields_are_checked(tmp_path, fields, reason):
    path = write(tmp_path / "m.jsonl", [mbpp_task(602), {**mbpp_task(601), **fields}])
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(name="mbpp", path=path))
    assert f"m.jsonl:2: {reason}" in caught.value.what


def apps_problem(i, difficulty="interview", **fields):
    return {
        "problem_id": i,
        "question": f"Question {i}",
        "solutions": json.dumps([f"first {i}", f"second {i}"]),
        "input_output": "{}",
        "difficulty": difficulty,
        "url": "",
        "starter_code": "",
        **fields,
    }


def test_apps_takes_the_first_solution_of_a_json_string_or_list(tmp_path):
    problems = [apps_problem(0), apps_problem(1, solutions=["listed"])]
    loaded = load_rows(DataConfig(name="apps", path=write(tmp_path / "a.jsonl", problems)))
    codes = {row.id: row.code for row in loaded.train + loaded.validation}
    assert codes == {"apps:0": "first 0", "apps:1": "listed"}


@pytest.mark.parametrize(
    ("solutions", "reason"),
    [
        ("", "empty field"),
        ("[]", "empty field"),
        ('["a"', "not JSON"),
        ('{"a": 1}', "wrong type"),
        (None, "wrong type"),
    ],
)
def test_apps_without_a_readable_solution_is_an_error(tmp_path, solutions, reason):
    path = write(tmp_path / "a.jsonl", [apps_problem(0), apps_problem(1, solutions=solutions)])
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(name="apps", path=path))
    assert f"a.jsonl:2: {reason}: `solutions`" in caught.value.what


def test_apps_filters_by_difficulty(tmp_path):
    problems = [apps_problem(i, d) for i, d in enumerate(["interview", "competition"] * 10)]
    path = write(tmp_path / "a.jsonl", problems)
    loaded = load_rows(DataConfig(name="apps", path=path, difficulty="competition"))
    numbers = sorted(int(row.id.split(":")[1]) for row in loaded.train + loaded.validation)
    assert numbers == list(range(1, 20, 2))
    assert loaded.ledger.set_aside == {"difficulty other than competition": 10}


def csn_function(i, partition="train", language="python"):
    return {
        "docstring": f"Doc {i}",
        "code": f"def f{i}(): pass",
        "language": language,
        "partition": partition,
    }


def test_codesearchnet_honours_partition_and_language(tmp_path):
    rows = [
        csn_function(0),
        csn_function(1, "valid"),
        csn_function(2, "test"),
        csn_function(3, language="java"),
        csn_function(4),
    ]
    path = write(tmp_path / "c.jsonl", rows)
    loaded = load_rows(DataConfig(name="codesearchnet", path=path))
    assert [row.text for row in loaded.train] == ["Doc 0", "Doc 4"]
    assert [row.text for row in loaded.validation] == ["Doc 1"]
    assert loaded.ledger.set_aside == {"test": 1, "language other than python": 1}
    java = load_rows(DataConfig(name="codesearchnet", path=path, language="java"))
    assert [(row.text, row.language) for row in java.train] == [("Doc 3", "java")]


def fake_hub(monkeypatch, splits):
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return splits[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_codesearchnet_from_the_hub_reads_its_own_columns_and_only_what_is_needed(monkeypatch):
    def row(i):
        return {
            "func_documentation_string": f"Doc {i}",
            "func_code_string": f"code {i}",
            "language": "java",
        }

    splits = {"train[:2]": [row(0), row(1)], f"validation[:{MAX_VALIDATION}]": [row(2)]}
    asked = fake_hub(monkeypatch, splits)
    loaded = load_rows(DataConfig(name="codesearchnet", language="java", limit=2))
    assert asked[0][:3] == ("code-search-net/code_search_net", "java", "train[:2]")
    assert [row.code for row in loaded.train] == ["code 0", "code 1"]
    assert [row.text for row in loaded.validation] == ["Doc 2"]
    assert loaded.train[1].origin.endswith("train[:2]:1")


def test_mbpp_and_apps_from_the_hub(monkeypatch):
    fake_hub(
        monkeypatch,
        {
            "train+validation": [mbpp_task(i) for i in (601, 602, 511)],
            "train": [apps_problem(i) for i in range(20)],
        },
    )
    mbpp = load_rows(DataConfig(name="mbpp"))
    assert (ids(mbpp.train), ids(mbpp.validation)) == (["mbpp:601", "mbpp:602"], ["mbpp:511"])
    apps = load_rows(DataConfig(name="apps"))
    assert len(apps.train) + len(apps.validation) == 20 and apps.validation


def test_an_unreachable_hub_is_an_error_that_offers_the_local_file(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="no network") as caught:
        load_rows(DataConfig(name="mbpp"))
    assert "data.path=FILE.jsonl" in caught.value.fix


@pytest.fixture
def builtin(monkeypatch):
    def task(i):
        java = {"java_code": f"int f() {{ return {i}; }}", "java_tests": [f"assert f() == {i};"]}
        return {**mbpp_task(i), **java}

    module = SimpleNamespace(split_tasks=lambda: ([task(1), task(2)], [task(3)]))
    monkeypatch.setitem(sys.modules, "flex.data.builtin", module)


def test_builtin_tasks_in_both_languages(builtin):
    python = load_rows(DataConfig())
    assert (ids(python.train), ids(python.validation)) == (
        ["builtin:1", "builtin:2"],
        ["builtin:3"],
    )
    assert python.ledger.read == 3
    java = load_rows(DataConfig(language="java")).train[0]
    assert (java.code, java.tests, java.language) == (
        "int f() { return 1; }",
        ("assert f() == 1;",),
        "java",
    )


def test_a_validation_file_replaces_the_builtin_validation(builtin, tmp_path):
    path = write(tmp_path / "v.jsonl", [mbpp_task(9)])
    loaded = load_rows(DataConfig(validation_path=path))
    assert (ids(loaded.train), ids(loaded.validation)) == (
        ["builtin:1", "builtin:2"],
        ["builtin:9"],
    )


def test_a_validation_file_leaves_all_of_path_to_training(tmp_path):
    validation = write(tmp_path / "v.jsonl", [pair(i) for i in range(3)])
    cfg = jsonl(tmp_path / "t.jsonl", [pair(i) for i in range(50)], validation_path=validation)
    loaded = load_rows(cfg)
    assert ids(loaded.train) == [f"jsonl:{i}" for i in range(50)]
    assert [row.origin for row in loaded.validation] == ["v.jsonl:1", "v.jsonl:2", "v.jsonl:3"]


def test_limit_cuts_training_rows_only_and_is_accounted(tmp_path):
    rows = [pair(i) for i in range(100)]
    whole = load_rows(jsonl(tmp_path / "r.jsonl", rows))
    cut = load_rows(jsonl(tmp_path / "r.jsonl", rows, limit=7))
    assert cut.train == whole.train[:7] and cut.validation == whole.validation
    assert cut.ledger.set_aside == {"beyond data.limit": len(whole.train) - 7}


def row(i):
    return Row("pair", str(i), f"f:{i}", f"text {i}", f"code {i}")


def test_hash_split_is_a_tenth_and_depends_on_the_row_alone():
    rows = [row(i) for i in range(2000)]
    train, validation = split_by_hash(rows)
    assert 150 < len(validation) < 250
    assert sorted(ids(train + validation)) == sorted(ids(rows))
    _, fewer = split_by_hash(rows[:1000][::-1])
    assert fewer[::-1] == [r for r in validation if int(r.id) < 1000]


def test_hash_split_keeps_equal_rows_together():
    train, validation = split_by_hash([row(i % 100) for i in range(300)])
    assert validation
    assert not {r.text for r in train} & {r.text for r in validation}


@pytest.mark.parametrize(("n", "held_out"), [(1, 0), (2, 1), (3, 1)])
def test_hash_split_of_a_handful_leaves_both_sides_a_row_where_it_can(n, held_out):
    train, validation = split_by_hash([row(i) for i in range(n)])
    assert (len(train), len(validation)) == (n - held_out, held_out)


def test_a_field_of_the_largest_size_passes(tmp_path):
    loaded = load_rows(jsonl(tmp_path / "r.jsonl", [pair(0, prompt="x" * MAX_CHARACTERS)]))
    assert len(loaded.train[0].text) == MAX_CHARACTERS
