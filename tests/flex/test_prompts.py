import pytest

from flex.data.prompts import render
from flex.data.rows import Row
from tests.flex.tiny_tokenizer import byte_tokenizer

TASK = Row(
    kind="task",
    id="mbpp:601",
    origin="mbpp.jsonl:601",
    text="Write a function to add.",
    code="def add(a, b):\r\n\treturn a + b\r\n\r\n",
    tests=("assert add(1, 2) == 3", "assert add(\r\n  0, 0) == 0"),
)
PROBLEM = Row("problem", "apps:1", "a:1", "Count.\n\n-----Input-----\nn\n", "print(1)\n")
STARTED = Row("problem", "apps:2", "a:2", "Count.", "print(1)", starter="def f(n):\n\t")
FUNCTION = Row("function", "c:1", "c:1", "Adds.\n\nReturns: sum", "def f():\n    pass")
PAIR = Row("pair", "r:1", "r:1", " give\r\n", "me\r\n\r\n")


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        (
            TASK,
            "Write a function to add.\n\n"
            "# assert add(1, 2) == 3\n# assert add(\n#   0, 0) == 0\n\n",
            "def add(a, b):\n\treturn a + b",
        ),
        (
            PROBLEM,
            "### Problem:\nCount.\n\n-----Input-----\nn\n\n### Solution:\n",
            "print(1)",
        ),
        (STARTED, "### Problem:\nCount.\n\ndef f(n):\n\n### Solution:\n", "print(1)"),
        (FUNCTION, "# Adds.\n#\n# Returns: sum\n\n", "def f():\n    pass"),
        (PAIR, " give\r\n", "me\r\n\r\n"),
    ],
)
def test_paper_template(row, prompt, completion):
    assert render(row, "paper", None) == (prompt, completion)


def test_a_python_paper_prompt_with_its_completion_is_a_program():
    prompted = render(FUNCTION, "paper", None)
    compile(prompted.prompt + prompted.completion, "row", "exec")


def test_java_is_commented_by_slashes():
    java = Row("task", "b:1", "b:1", "Add.", "int f() {}", "java", ("assert f() == 1;",))
    assert render(java, "paper", None).prompt == "Add.\n\n// assert f() == 1;\n\n"


def test_instruct_without_a_chat_template():
    prompt, completion = render(TASK, "instruct", byte_tokenizer())
    assert prompt == (
        "### Instruction:\nSolve this task in Python.\n\nWrite a function to add.\n\n"
        "These tests must pass:\nassert add(1, 2) == 3\nassert add(\n  0, 0) == 0\n\n"
        "### Response:\n```python\n"
    )
    assert completion == "def add(a, b):\n\treturn a + b\n```"


def test_instruct_uses_the_chat_template_of_the_tokenizer():
    prompt, completion = render(FUNCTION, "instruct", byte_tokenizer(chat=True))
    assert prompt == (
        "<s>user\nWrite a Python function that does what this docstring says.\n\n"
        "Adds.\n\nReturns: sum</s>\n<s>assistant\n```python\n"
    )
    assert completion == "def f():\n    pass\n```"


def test_instruct_shows_the_starter_code_and_does_not_fence_a_pair():
    assert "\n\nStart from this code:\ndef f(n):\n" in render(STARTED, "instruct", None).prompt
    prompt, completion = render(PAIR, "instruct", byte_tokenizer(chat=True))
    assert prompt == "<s>user\n give\r\n</s>\n<s>assistant\n"
    assert completion == "me\r\n\r\n"
