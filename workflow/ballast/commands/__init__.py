"""The `ballast` command: one module for each group of commands; `app.main` runs them.

Modules here are imported at every start, so they import pandas, torch and the like in functions.
"""
