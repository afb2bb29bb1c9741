"""The study: what scheduling a heavy and a light model is worth, and what predicts it. ``docs/study.md`` is read first.

`setting`: models, judge, held-out text and sizes; `quality`, `fitted`, `likelihoods`, `routing`: the experiments, a
function each; `runner`: which of them are run, and where they are kept; `train` and `texts`: families of models, and
what they are trained on; `everything`: all of it, as the `jobs` of one command. `benchmarks.study_tables` and
`benchmarks.study_figures` show the results.
"""
