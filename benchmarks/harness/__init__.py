"""What ``benchmarks/study.py`` is made of.

``trial`` says what one training run is, ``tasks`` has the models and their data, ``optimizers`` the
optimizers, ``training`` runs one trial, ``store`` keeps results, ``experiment`` plans which trials
an experiment still needs, ``runner`` runs them side by side, ``statistics`` compares arms and
``report`` writes the page.
"""
