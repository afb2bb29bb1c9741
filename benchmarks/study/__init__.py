"""The study: what scheduling a heavy and a light model is worth, and what predicts it. ``docs/study.md`` is read first.

`setting`: models, judge, held-out text and sizes; `quality`, `search`, `measures`: the experiments, a function each;
`runner`: which of them are run, and where they are kept; `benchmarks.study_tables` and `benchmarks.study_figures` show
them.
"""
