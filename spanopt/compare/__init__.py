"""A test of whether span scaling helps *your* model: it trains arms and controls on equal seeds.

    from spanopt.compare import compare

    result = compare(train, arms={"(2, 1)": (2, 1)}, seeds=10)
    print(result)

It needs SciPy, rich and matplotlib: ``pip install ".[compare]"`` in a clone. They are imported when
they are used, so ``import spanopt`` works without them. The files:

- ``arms`` says what is compared, ``wrapping`` puts it on the user's optimizer, ``trial`` calls the
  user's function once;
- ``grid`` and ``planning`` say which trials any study needs, ``design`` which this one needs too;
- ``pool`` runs trials, ``jsonl`` and ``store`` keep their results, ``progress`` shows them;
- ``statistics`` and ``sequential`` compare arms, ``reading`` says it in words, ``drawing`` draws;
- ``engine`` puts these parts together, ``result`` has what it returns, ``command`` is the command
  line.

``benchmarks/study.py`` uses the same parts, as far as they know nothing of the user's function.
"""

from spanopt.compare.arms import Arm
from spanopt.compare.engine import compare
from spanopt.compare.result import Comparison
from spanopt.compare.wrapping import Wrap

__all__ = ["Arm", "Comparison", "Wrap", "compare"]
