"""The one error type a user sees: what happened, why it matters, what to type."""


class FlexError(Exception):
    """A problem the user can fix, told in three parts.

    Args:
        what: what happened, with the offending value.
        why: why the run cannot go on.
        fix: what to type or change.
    """

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


class ConfigError(FlexError):
    """The configuration, or its combination with the machine, is not valid."""


class DataError(FlexError):
    """A data file or row cannot be used."""


class ModelError(FlexError):
    """A model, tokenizer or adapter cannot be loaded or saved."""


class CheckpointError(FlexError):
    """A checkpoint is missing, damaged or does not belong to this run."""


class CurvatureError(FlexError):
    """Sophia's curvature estimate is dead: the run would be sign-momentum in disguise."""
