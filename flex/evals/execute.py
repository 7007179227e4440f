"""Runs programs in the sandbox and says how they ended. The proof of a pass: see languages.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from flex.errors import DataError
from flex.evals.java_compiler import JavaCompiler
from flex.evals.journal import Outcome
from flex.evals.languages import PATH, TUPLES, main_class, table, toolchain
from flex.evals.sandbox import Report, Sandbox, Stage
from flex.evals.tasks import Program

K = TypeVar("K")
DETAIL = 300  # characters of standard error that a result keeps
OUT_OF = (
    "MemoryError", "std::bad_alloc", "OutOfMemoryError", "heap out of memory", "memory allocation of",
    "Resource temporarily unavailable", "No space left on device", "File too large", "Out of memory",
)  # fmt: skip
FAILED = ("Assertion `", "assertion `", "assertion failed", "AssertionError")


class Runner:
    """Runs programs of one language, `workers` at once; a context manager, `run` is thread-safe.

    Args:
        language: one that languages.py knows.
        workers: programs at once in `run_many`.
        allow_unsandboxed: run with limits only where no sandbox works.
        seconds: wall time of a run, for programs that say none; None is the language's own.
        memory_bytes: limit of a program's memory.

    Attributes:
        level: the sandbox that was found.
        toolchain: its version line; None if it is missing, and every run then says "missing".
        missing: what is missing of the tool chain; "" if it is there.

    Raises:
        DataError: unknown language, nothing isolates and `allow_unsandboxed` is False, or an empty
            program does not pass.
    """

    def __init__(
        self,
        language: str,
        *,
        workers: int = 2,
        allow_unsandboxed: bool = False,
        seconds: float | None = None,
        memory_bytes: int = 1 << 30,
    ) -> None:
        languages = table(memory_bytes)
        if language not in languages:
            raise DataError(
                f"no way to run {language!r}",
                "its completions could not be judged",
                f"choose one of {', '.join(languages)}",
            )
        self.language = language
        self._language = languages[language]
        self._seconds, self._workers = seconds, workers
        self._tools = toolchain(self._language)
        self.toolchain, self.missing = self._tools.version, self._tools.missing
        self._sandbox = Sandbox(allow_unsandboxed, self._tools.readable)
        self.level = self._sandbox.level
        self._java: JavaCompiler | None = None
        if self._language.java and self.toolchain is not None:
            self._java = JavaCompiler(self._sandbox, self._tools.tools["java"], TUPLES, PATH)
        if self.toolchain is not None:
            self._try_out()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the Java compiler; nothing else outlives a run."""
        if self._java is not None:
            self._java.close()

    def run(self, program: Program) -> Outcome:
        """Compile and run; "passed" if it ran to the end of its source and exited with 0."""
        return self._judge(program, run=True)

    def compile_only(self, program: Program) -> Outcome:
        """ "passed" if it compiles; languages without a compiler pass."""
        return self._judge(program, run=False)

    def run_many(self, programs: Iterable[tuple[K, Program]]) -> Iterator[tuple[K, Outcome]]:
        """The outcomes as they end, `workers` at once."""
        source = iter(programs)
        with ThreadPoolExecutor(self._workers) as pool:
            running: dict[Future[Outcome], K] = {}
            while True:
                while len(running) < self._workers and (item := next(source, None)) is not None:
                    running[pool.submit(self.run, item[1])] = item[0]
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()

    def _try_out(self) -> None:
        outcome = self.run(Program(self.language, self._language.trial))
        if outcome.kind != "passed":
            self.close()
            tools = ", ".join(self._tools.tools.values()) or self.toolchain
            raise DataError(
                f"{tools}: an empty program does not pass ({outcome.kind}: {outcome.detail})",
                "every completion would be judged wrong",
                "mend the tool chain, or try another sandbox: install bubblewrap",
            )

    def _judge(self, program: Program, run: bool) -> Outcome:
        if self.toolchain is None:
            return Outcome("missing", 0.0, self._tools.missing)
        if program.language != self.language:
            raise ValueError(f"a program in {program.language}, the runner is for {self.language}")
        try:
            source = program.source.encode()
        except UnicodeEncodeError as error:
            return Outcome("compile", 0.0, f"the source is not valid text: {error}")
        files = {name: text.encode() for name, text in self._language.files.items()}
        if self._java is None:
            files[self._language.name] = source
        else:
            try:
                found = self._java.compile({f"{main_class(program)}.java": program.source})
            except TimeoutError as error:
                return Outcome("timeout", 0.0, str(error))
            classes, messages = found
            if classes is None:
                return Outcome("compile", 0.0, _tail(messages))
            files |= classes | self._java.classes
        compiling = self._language.compile
        stages = [*compiling, *([self._last(program)] if run else [])]
        if not stages:
            return Outcome("passed", 0.0)
        report = self._sandbox.run(files, [self._tools.locate(stage) for stage in stages])
        kind = _kind(report, 0 <= report.stage < len(compiling), run)
        return Outcome(kind, round(report.seconds, 4), _detail(report))

    def _last(self, program: Program) -> Stage:
        stage = self._language.run
        argv = tuple(part.format(main_class=main_class(program)) for part in stage.argv)
        seconds = program.seconds or self._seconds or stage.seconds
        return replace(stage, argv=argv, seconds=seconds)


def _kind(report: Report, compiling: bool, run: bool) -> str:
    if report.why:
        return "timeout" if report.why == "timeout" else "limit"
    if compiling:
        return "compile" if report.status or run else "passed"
    if report.status == 0 and report.ended:
        return "passed"
    if report.said == "compile":
        return "compile"
    if report.status == -24:  # SIGXCPU
        return "timeout"
    if report.status == -25 or any(text in report.err[-2000:] for text in OUT_OF):  # SIGXFSZ
        return "limit"
    if report.said == "wrong" or any(text in report.err[-4000:] for text in FAILED):
        return "wrong"
    return "exception"


def _detail(report: Report) -> str:
    if report.status == 0 and report.ended and not report.why:
        return ""
    text = _tail(report.err)
    early = "exit 0 before the end of the program" if report.status == 0 else ""
    return report.why or text or early or f"exit status {report.status}"


def _tail(text: str) -> str:
    return text.replace("\x00", "").strip()[-DETAIL:]
