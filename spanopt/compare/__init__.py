"""Does span scaling help *my* model? Arms trained on the same seeds, with their controls.

    from spanopt.compare import compare

    result = compare(train, arms={"(2, 1)": (2, 1)}, seeds=10)
    print(result)

It needs SciPy, rich and matplotlib: ``pip install ".[compare]"`` in a clone. They are imported when
they are used, so that ``import spanopt`` does without. What is in which file:

- ``arms`` says what is compared, ``wrapping`` puts it on the user's optimizer, ``trial`` calls the
  user's function once;
- ``grid`` and ``planning`` say which trials are needed, ``design`` adds what is this package's own;
- ``pool`` runs trials, ``jsonl`` and ``store`` keep their results, ``progress`` shows them;
- ``statistics`` and ``sequential`` compare arms, ``reading`` says it in words, ``drawing`` draws;
- ``engine`` puts all of this together, ``result`` is what it returns, ``command`` the command line.

The parts that know nothing of the user's function are also those of ``benchmarks/study.py``.
"""

from spanopt.compare.arms import Arm
from spanopt.compare.engine import compare
from spanopt.compare.result import Comparison
from spanopt.compare.wrapping import Wrap

__all__ = ["Arm", "Comparison", "Wrap", "compare"]
