"""The experiments of the paper, as ``examples/paper`` has them: for ``tools/paper_recipe.py`` and ``paper_table.py``.

recipes.py     settings, rows and tables; a setting and a row as one file of flags
resolved.py    all flags of a recipe, defaults included
table_run.py   train and evaluate the rows of a table
"""
