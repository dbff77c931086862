"""Of the branches alone how many percent were taken: `coverage report` counts lines and branches together.

coverage json -o - | python -m tests.branches 90
"""

import json
import sys

totals = json.load(sys.stdin)["totals"]
taken = 100 * totals["covered_branches"] / totals["num_branches"]
print(f"branches: {taken:.1f} % of {totals['num_branches']}")
sys.exit(taken < float(sys.argv[1]))
