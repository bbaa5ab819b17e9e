"""All benchmarks, one after the other, each in a process of its own. Figures are ratios: see each file."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"run.py", "interleaved.py", "coverage.py", "simulation.py", "__init__.py"}

if __name__ == "__main__":
    for path in sorted(HERE.glob("*.py")):
        if path.name not in NOT_BENCHMARKS:
            subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}"], cwd=HERE.parent, check=True)
