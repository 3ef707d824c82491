"""Bad input for every command and every file format, made by mutating good input.

    python -m attack --count 5000     (in the folder tests)

`cases.py` makes the inputs, `worker.py` runs them, and `report.py` judges what happened.
"""
