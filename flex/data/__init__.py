"""Rows -> prompts -> tokens -> micro-batches."""
