"""The optimizer race: does Sophia reach AdamW's loss with a smaller budget? `python -m flex race`.

protocol.py   what is raced: entrants, their search boxes, budgets, seeds; from a YAML file
single.py     one run, in this process: a final validation loss and what it cost
workers.py    many runs at once, each in a process of one thread
stages.py     tune, freeze the target, evaluate; resumable
analysis.py   R = budget Sophia needs / budget AdamW needs, with intervals; the verdict
report.py     CSV, plots and the text
"""
