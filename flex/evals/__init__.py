"""Evaluation: results of runs of programs, their statistics and comparison."""
