"""What a benchmark is made of: tasks that a model continues, and the programs that judge it.

    Task.prompt --model--> completion --Task.program--> Program --Runner--> Outcome

Loaders (humaneval.py, mbpp.py, apps.py, multipl_e.py, mxeval.py, builtin) make tasks; execute.py
runs programs. A program passes if it runs to the end of its source and exits with 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# By the names that MultiPL-E uses.
LANGUAGES = ("py", "java", "js", "ts", "cpp", "rs", "sh", "pl", "go", "php", "rb", "lua", "cs")


@dataclass(frozen=True)
class Program:
    """Source in one language, tests included.

    Attributes:
        language: one of LANGUAGES.
        source: the whole program. Python: statements, run to the end as `__main__`. Java: a file
            whose public class or class with `main` is `main_class`. Others: as their tool chain
            takes a main file.
        seconds: limit of the run's wall time, without compiling; None is the language's own.
        main_class: Java's class with `main`; "" elsewhere.
    """

    language: str
    source: str
    seconds: float | None = None
    main_class: str = ""


@dataclass(frozen=True)
class Task:
    """One problem. A completion is judged as `before + completion + after`.

    Where the tests run the completion several times (APPS), `quoted` puts it there as a Python
    string literal in place of its text.

    Attributes:
        task_id: unique within the benchmark.
        prompt: what the model reads, byte for byte.
        stops: a completion ends before the first of these, which is not part of it.
        before, after: source around the completion; `before` is often the prompt, `after` the tests.
        solution: a completion that passes, where the data holds one.
        reference: (context, solution) whose likelihood `nll` measures; None where there is none.
    """

    task_id: str
    language: str
    prompt: str
    stops: tuple[str, ...]
    before: str
    after: str
    solution: str | None = None
    reference: tuple[str, str] | None = None
    seconds: float | None = None
    main_class: str = ""
    quoted: bool = False

    def program(self, completion: str) -> Program:
        """The program that judges `completion`."""
        source = self.before + (repr(completion) if self.quoted else completion) + self.after
        return Program(self.language, source, self.seconds, self.main_class)


@dataclass(frozen=True)
class Benchmark:
    """A set of tasks of one language.

    Attributes:
        name: as on the command line, such as `humaneval` or `multipl-e-java`.
        source: Hub id and revision, or file name and sha256; goes into the result.
        protocol: prompt form and the like; goes into the result's protocol.
        max_new_tokens: what the set is usually run with.
    """

    name: str
    language: str
    tasks: tuple[Task, ...]
    source: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 512
