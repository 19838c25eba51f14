"""The machine for questions: an experiment names its runs, and everything else about it happens here.

A leaf of `experiments/` gives a question, settings (`StudySettings`) and `arms(settings)`: the name of each thing that is
compared with the config keys in which it differs. `planning` makes the runs of all arms and seeds and refuses what would not
be fair; `carrying` carries out those that are not there yet, together where one base can serve several; `scoring` scores
their answers again, example by example, and says whether the data can decide; `telling` writes table, numbers and page.
"""
