"""Optimizers: Sophia-G with live curvature, its controls, and learning-rate schedules."""

from .curvature import CurvatureStats, sample_labels
from .factory import build_optimizer, parameter_groups
from .lion import Lion, Signum
from .schedules import learning_rate
from .sophia import Sophia

__all__ = [
    "CurvatureStats",
    "Lion",
    "Signum",
    "Sophia",
    "build_optimizer",
    "learning_rate",
    "parameter_groups",
    "sample_labels",
]
