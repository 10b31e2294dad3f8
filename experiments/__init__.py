"""The paper's tables, each a script over the public interfaces: `python -m experiments.NAME`."""
