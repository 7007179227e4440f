"""Rows to prompt and completion, by the published templates or as an instruction."""

from __future__ import annotations

from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from flex.data.rows import Row

_COMMENT = {"python": "# ", "java": "// "}
_NAME = {"python": "Python", "java": "Java"}


class Prompted(NamedTuple):
    """What the model is given, and what it must write."""

    prompt: str
    completion: str


def render(
    row: Row, template: Literal["paper", "instruct"], tokenizer: PreTrainedTokenizerBase | None
) -> Prompted:
    """Make prompt and completion of a row.

    paper: the published layouts (text and commented asserts; `### Problem:`; commented docstring).
    Every line of a multi-line assert or docstring is commented, so that the whole stays a program.

    instruct: an instruction, in the tokenizer's chat template if it has one. The code is fenced, as
    chat models answer; the opening fence belongs to the prompt, so generation starts in the code
    and ends at the closing fence.

    Line ends become LF and the code loses trailing blanks, so that EOS follows its last line. The
    two strings of a `pair` are never altered.
    """
    return _paper(row) if template == "paper" else _instruct(row, tokenizer)


def _paper(row: Row) -> Prompted:
    if row.kind == "pair":
        return Prompted(row.text, row.code)
    text, code = _lf(row.text).strip(), _lf(row.code).rstrip()
    if row.kind == "task":
        tests = "".join(_commented(test, row.language) for test in row.tests)
        return Prompted(f"{text}\n\n{tests}\n", code)
    if row.kind == "problem":
        starter = _lf(row.starter).rstrip()
        start = f"{starter}\n\n" if starter else ""
        return Prompted(f"### Problem:\n{text}\n\n{start}### Solution:\n", code)
    return Prompted(f"{_commented(text, row.language)}\n", code)


def _instruct(row: Row, tokenizer: PreTrainedTokenizerBase | None) -> Prompted:
    if row.kind == "pair":
        return Prompted(_chat(row.text, tokenizer), row.code)
    text, language = _lf(row.text).strip(), _NAME[row.language]
    if row.kind == "task":
        tests = "\n".join(_lf(test) for test in row.tests)
        instruction = f"Solve this task in {language}.\n\n{text}\n\nThese tests must pass:\n{tests}"
    elif row.kind == "problem":
        starter = _lf(row.starter).rstrip()
        start = f"\n\nStart from this code:\n{starter}" if starter else ""
        instruction = f"Solve this problem in {language}.\n\n{text}{start}"
    else:
        instruction = f"Write a {language} function that does what this docstring says.\n\n{text}"
    prompt = f"{_chat(instruction, tokenizer)}```{row.language}\n"
    return Prompted(prompt, f"{_lf(row.code).rstrip()}\n```")


def _chat(instruction: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        return f"### Instruction:\n{instruction}\n\n### Response:\n"
    messages = [{"role": "user", "content": instruction}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _commented(text: str, language: str) -> str:
    mark = _COMMENT[language]
    return "".join(f"{mark}{line}".rstrip() + "\n" for line in _lf(text).split("\n"))


def _lf(text: str) -> str:
    """MBPP's code has CRLF line ends; a model should not learn to write them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
