"""A broken battles file is reported before torch and transformers, which take seconds to import."""

import subprocess
import sys
from pathlib import Path

import rewardmodel.data

MODULES = sorted(path.stem for path in Path(rewardmodel.data.__file__).parent.glob("*.py"))


def test_no_module_of_data_imports_torch_or_transformers():
    names = [f"rewardmodel.data.{name}" for name in MODULES if name != "__init__"]
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'transformers', 'trl'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True)
    assert done.stdout.strip() == "[]"
    assert len(names) >= 8
